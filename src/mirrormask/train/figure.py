"""The figure of a run: how accuracy, loss, sparsity and the implicit bias went, and where the zeros are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirrormask import checks, files
from mirrormask.train import log
from mirrormask.train.run_folder import RunResult

__all__ = ["draw"]

INK, SOFT = "#22303c", "#8a97a3"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6db5", "#d9822b", "#3c8d5a", "#b8433a", "#7a5aa6"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    # Given, where matplotlib would look for it among the labels at every draw.
    "axes.titley": 1.0,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6eaee",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "mirrormask",
}
#: More layers than this are drawn without their names.
NAMED_LAYERS = 30
#: Longer names of layers are drawn without their beginning.
NAME_LENGTH = 24
#: Inches: a panel, the room around its axes, and what the title takes. A layout engine would measure each text four
#: times over to find these, which took two thirds of drawing.
PANEL, LEFT, RIGHT, ABOVE, BELOW, TITLE = (4.2, 3.1), 0.55, 0.55, 0.3, 0.45, 0.4


def draw(folder: str | Path, result: RunResult) -> None:
    """Write ``figure.png`` and ``figure.svg`` of a run from its log and result.

    Panels that would be empty are left out: a dense run has no decay and no zeros.

    Args:
        folder: the run's folder, with its ``log.jsonl``.
        result: the run's result.
    """
    checks.require("matplotlib", "train", "drawing a run")
    # Not pyplot: it keeps global state, and may look for a display.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = log.read(folder)
    panels = [_accuracy, _loss]
    if result.sparsity_asked:
        panels += [_sparsity, _layers]
        if any(_column(records, "decay_integral")[1]):
            panels += [_decay, _bias]
    columns = 2 if len(panels) < 5 else 3
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        width, height = PANEL[0] * columns, PANEL[1] * rows + TITLE
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        for i, panel in enumerate(panels):
            left = PANEL[0] * (i % columns) + LEFT
            low = PANEL[1] * (rows - 1 - i // columns) + BELOW
            size = PANEL[0] - LEFT - RIGHT, PANEL[1] - ABOVE - BELOW
            axis = figure.add_axes((left / width, low / height, size[0] / width, size[1] / height))
            panel(axis, records, result)
            if panel is not _layers:
                axis.set_xlabel("epoch")
                axis.set_xlim(0, result.epochs)
        figure.suptitle(_title(result), x=0.01, y=1 - 0.1 / height, ha="left", fontsize=11, fontweight="bold")
        for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            with files.atomic_write(Path(folder) / f"figure.{suffix}") as file:
                figure.savefig(file, format=suffix, **options)


def _title(result: RunResult) -> str:
    recipe = result.recipe
    where = f"{recipe['model']['name']} on {recipe['data']['name']}, seed {result.seed}"
    if not result.sparsity_asked:
        return f"dense: {where}: {100 * result.test_accuracy:.2f}% test accuracy"
    return (
        f"{result.method} at {100 * result.sparsity_asked:g}% sparsity: {where}: "
        f"{100 * result.test_accuracy:.2f}% test accuracy with {result.nonzeros:,} of {result.numel:,} weights"
    )


def _column(records: Iterable[dict[str, Any]], key: str, events: tuple[str, ...] = ("step", "epoch")) -> Any:
    """Epochs (as fractions) and values of the records that hold ``key``."""
    chosen = [r for r in records if r["event"] in events and r.get(key) is not None]
    return [r["epoch_progress"] for r in chosen], [r[key] for r in chosen]


def _accuracy(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("accuracy (%)")
    held_out = "test" if result.validation_accuracy is None else "validation"
    lowest, highest = 100.0, 0.0
    for key, color, label in (("train_accuracy", SOFT, "training"), (f"{held_out}_accuracy", BLUE, held_out)):
        x, y = _column(records, key, ("epoch",))
        axis.plot(x, [100 * v for v in y], color=color, label=label, marker="." if len(x) < 40 else None)
        # The first epochs would take all the room from the differences that matter.
        lowest = min([lowest, *(100 * v for v in y[len(y) // 4 :])])
        highest = max([highest, *(100 * v for v in y)])
    final = 100 * (result.test_accuracy if result.validation_accuracy is None else result.validation_accuracy)
    axis.plot([result.epochs], [final], "*", color=RED, markersize=11, label=f"final model: {final:.2f}", clip_on=False)
    margin = 0.1 * (max(highest, final) - min(lowest, final)) + 0.2
    axis.set_ylim(min(lowest, final) - margin, max(highest, final) + margin)
    axis.legend(loc="best")


def _loss(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("training loss, learning rate")
    # A short run has few lines between its epochs; then an epoch's mean is the smoother curve.
    events = ("step",) if len(_column(records, "loss", ("step",))[0]) > 2 * result.epochs else ("epoch",)
    x, y = _column(records, "loss", events)
    axis.plot(x, y, color=INK, linewidth=1, label="loss")
    axis.set_yscale("log")
    x, y = _column(records, "lr")
    rate = _second(axis)
    rate.plot(x, y, color=GREEN, linewidth=1, linestyle="--", label="learning rate")
    rate.set_ylim(0, None)
    _legend(axis, rate, "upper right")


def _sparsity(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("sparsity (%)")
    x, y = _column(records, "sparsity")
    axis.plot([*x, result.epochs], [100 * v for v in [*y, result.sparsity]], color=BLUE, label="zeros")
    x, y = _column(records, "below_threshold")
    axis.plot(x, [100 * v for v in y], color=ORANGE, label="below threshold")
    axis.axhline(
        100 * result.sparsity_asked, color=SOFT, linestyle=":", label=f"asked: {100 * result.sparsity_asked:g}"
    )
    axis.set_ylim(-2, 102)
    flips = _second(axis)
    x, y = _column(records, "sign_flips")
    flips.plot(x, y, color=PURPLE, linewidth=1, linestyle="--", label="sign flips (right)")
    flips.set_ylim(0, None)
    _legend(axis, flips, "center right")


def _layers(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("nonzeros per layer (%)")
    kept = [100 * layer.nonzeros / layer.numel for layer in result.layers]
    axis.barh(range(len(kept)), kept, color=BLUE, height=0.7)
    axis.axvline(100 * (1 - result.sparsity_asked), color=SOFT, linestyle=":")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if len(kept) > NAMED_LAYERS:
        axis.set_ylabel("layer")
        return
    size = 8 if len(kept) < 12 else 6
    names = [layer.name.removesuffix(".weight") for layer in result.layers]
    names = [name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :] for name in names]
    axis.set_yticks(range(len(kept)), names)
    axis.tick_params(axis="y", length=0, labelsize=size)
    # Names are the only labels whose width is not known before; a letter is some 0.6 of its height, in points.
    room, box = 0.6 * size / 72 * max(map(len, names)), axis.get_position()
    shift = max(0.0, room - LEFT + 0.15) / PANEL[0] * box.width / (1 - (LEFT + RIGHT) / PANEL[0])
    axis.set_position((box.x0 + shift, box.y0, box.width - shift, box.height))
    for i, (layer, share) in enumerate(zip(result.layers, kept, strict=True)):
        axis.text(share, i, f" {share:.1f}% = {layer.nonzeros:,}", va="center", fontsize=size)
    axis.set_xlim(0, 1.35 * max(kept))


def _decay(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("decay α and its integral")
    x, y = _column(records, "alpha")
    axis.plot(x, y, color=ORANGE, label="α")
    axis.set_ylim(0, None)
    total = _second(axis)
    x, y = _column(records, "decay_integral")
    total.plot(x, y, color=RED, linestyle="--", label="∫ α (right)")
    total.set_ylim(0, None)
    _legend(axis, total, "upper left")


def _bias(axis: Any, records: list[dict[str, Any]], result: RunResult) -> None:
    axis.set_title("median a (L2 above, L1 below) and ‖x‖₁")
    x, y = _column(records, "median_a")
    axis.plot(x, y, color=PURPLE, label="median a")
    positive = [v for v in y if v > 0]
    if positive and max(positive) > 20 * min(positive):
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, None)
    norm = _second(axis)
    x, y = _column(records, "l1_norm")
    norm.plot(x, y, color=GREEN, linestyle="--", label="‖x‖₁ (right)")
    norm.set_ylim(0, None)
    _legend(axis, norm, "upper right")


def _second(axis: Any) -> Any:
    """A second vertical axis on the right, without a grid of its own."""
    twin = axis.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    return twin


def _legend(axis: Any, twin: Any, place: str) -> None:
    lines = [*axis.get_lines(), *twin.get_lines()]
    lines = [line for line in lines if not line.get_label().startswith("_")]
    twin.legend(lines, [line.get_label() for line in lines], loc=place)

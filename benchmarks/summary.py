"""The first table and figure of docs/results.md, from the results that docs/data/accuracy.json keeps.

    python benchmarks/summary.py                                    # writes the block of the page, and the figure
    python benchmarks/summary.py --add FOLDER --network ResNet-7 --data CIFAR-10 --budget "SGD, 14 epochs" --anchor NAME

The second form keeps what a comparison in FOLDER (`mirrormask compare`) has trained so far, in place of what was kept
of the same methods, network, data and budget, or of all methods at its sparsities where the number of seeds is another;
with `--part sgd/200` what that part of a grid of fine-tuning has
(`benchmarks/finetune.py`). A row's rival is the method with the best mean that is not `mirror`, nor a
setting of another (a label with a slash). Differences are paired over seeds where the runs were, with a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mirrormask.compare.grid import method_of
from mirrormask.compare.statistics import DENSE, paired_tests, summarize

DOCS = Path(__file__).parent.parent / "docs"
KEPT, PAGE, FIGURE = DOCS / "data" / "accuracy.json", DOCS / "results.md", DOCS / "figures" / "results"
BEGIN, END = "<!-- at a glance: begin; written by benchmarks/summary.py -->\n", "<!-- at a glance: end -->\n"
OURS = "mirror"
#: Of networks at many sparsities, those of the table.
SHOWN = ("90", "95", "98", "99", "99.5")

Cell = list[float | None]


def experiments() -> list[dict[str, Any]]:
    """What is kept."""
    found: list[dict[str, Any]] = json.loads(KEPT.read_text("utf-8"))
    return found


def rival(level: dict[str, Any]) -> str | None:
    """The best method but ours."""
    others = [name for name in level["methods"] if method_of(name) != OURS and "/" not in name]
    return max(others, key=lambda name: level["methods"][name][0], default=None)


def difference(level: dict[str, Any], name: str) -> tuple[float, float | None]:
    """Ours minus ``name``, and half of its interval: None where the runs are not paired or too few."""
    if name in level["paired"]:
        mean, half = level["paired"][name]
        return mean, half
    return level["methods"][OURS][0] - level["methods"][name][0], None


def verdict(mean: float, half: float | None) -> str:
    """What the interval allows to say."""
    if half is None:
        return "not tested"
    return "level" if abs(mean) <= half else ("ahead" if mean > 0 else "behind")


def shown(cell: Cell | None) -> str:
    """A mean and its interval."""
    if cell is None:
        return "-"
    return f"{cell[0]:.2f}" if cell[1] is None else f"{cell[0]:.2f} ± {cell[1]:.2f}"


def rows(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each experiment and sparsity that has ours and a rival."""
    found = []
    for experiment in kept:
        for level in SHOWN:
            own = experiment["levels"].get(level)
            if own is None or OURS not in own["methods"] or rival(own) is None:
                continue
            name = str(rival(own))
            mean, half = difference(own, name)
            found.append({**experiment, "level": level, "own": own, "rival": name, "lead": mean, "half": half})
    return found


def block(kept: list[dict[str, Any]]) -> str:
    """What stands first on the page."""
    found = rows(kept)
    counts = {
        word: sum(verdict(row["lead"], row["half"]) == word for row in found) for word in ("ahead", "level", "behind")
    }
    said = ", ".join(f"{word} in {number}" for word, number in counts.items())
    untested = len(found) - sum(counts.values())
    lines = [
        "![mirror against the best other method](figures/results.svg)",
        "",
        f"`mirror` against the best other method of each table: {said} of {len(found)} rows by the 95% interval, "
        f"{untested} not tested",
        "(in the picture blue, dark grey, red and pale). A CPU's few epochs leave networks far below what",
        "they reach in the literature; nothing was measured on a GPU yet.",
        "",
        "| network, data | budget | sparsity | dense | `mirror` | best other method | difference | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        other = row["own"]["methods"][row["rival"]]
        lead = f"{row['lead']:+.2f}" + ("" if row["half"] is None else f" ± {row['half']:.2f}")
        cells = [
            f"[{row['network']}, {row['data']}](#{row['anchor']})",
            row["budget"],
            f"{row['level']}%",
            shown(row["own"]["dense"]),
            shown(row["own"]["methods"][OURS]),
            f"`{row['rival']}` {shown(other)}",
            f"{lead}, {verdict(row['lead'], row['half'])}",
            str(row["seeds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "The best other method is chosen by its mean on the same images, which favours it. Intervals are not"]
    lines += ["corrected for the number of rows."]
    return "\n".join(lines) + "\n"


def draw(kept: list[dict[str, Any]]) -> None:
    """The differences with their intervals, a line a row of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "mirrormask"
    found = rows(kept)
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(found) + 1), layout="constrained")
    colours = {"ahead": "#3949ab", "level": "#757575", "behind": "#c62828", "not tested": "#bdbdbd"}
    for place, row in enumerate(found):
        colour = colours[verdict(row["lead"], row["half"])]
        # Two seeds make intervals wider than the picture; an arrow would say no more.
        axes.errorbar(row["lead"], place, xerr=row["half"] or 0.0, fmt="o", color=colour, capsize=3, markersize=5)
    axes.axvline(0, color="black", linewidth=1)
    names = [f"{r['network']}, {r['budget']}: {r['level']}%, vs {r['rival']}" for r in found]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-3, 6)
    axes.set_xlabel("mirror minus the best other method, points (95% interval)")
    axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(FIGURE.with_suffix(".png"), dpi=140)


#: (method, sparsity, seed) -> accuracy in [0, 1].
Values = dict[tuple[str, float, int], float]


def compared(folder: Path) -> Values:
    """What a comparison has trained."""
    runs = json.loads((folder / "comparison.json").read_text("utf-8"))["runs"]
    return {(r["method"], 0.0 if r["method"] == DENSE else r["sparsity"], r["seed"]): r["accuracy"] for r in runs}


def fine_tuned(folder: Path, part: str) -> Values:
    """What a part of a grid of fine-tuning has, with the networks that it began with as the dense ones."""
    found: Values = {}
    for line in map(json.loads, (folder / "results.jsonl").read_text("utf-8").splitlines()):
        if "dense" in line:
            found[DENSE, 0.0, line["seed"]] = line["accuracy"]
            continue
        kind, _, base, steps, sparsity, method, _, _, seed = line["cell"]
        if kind == "run" and f"{base}/{steps}" == part:
            found[method, sparsity, seed] = line["accuracy"]
    return found


def kept_of(values: Values, about: dict[str, str]) -> dict[str, Any]:
    """What was trained, as this file keeps it."""

    def points(mean: float, half: float | None) -> Cell:
        return [round(100 * mean, 2), None if half is None else round(100 * half, 2)]

    levels: dict[str, Any] = {}
    summaries = summarize(values)
    dense = next((points(row.mean, row.half_width) for row in summaries if row.method == DENSE), None)
    for row in summaries:
        if row.method != DENSE:
            level = levels.setdefault(f"{100 * row.sparsity:.6g}", {"dense": dense, "methods": {}, "paired": {}})
            level["methods"][row.method] = points(row.mean, row.half_width)
    for pair in paired_tests(values):
        if OURS in (pair.a, pair.b) and pair.difference is not None and len(pair.seeds) > 1:
            other, sign = (pair.b, 1) if pair.a == OURS else (pair.a, -1)
            levels[f"{100 * pair.sparsity:.6g}"]["paired"][other] = points(sign * pair.difference, pair.half_width)
    seeds = len({seed for _, _, seed in values})
    return {**about, "seeds": seeds, "levels": levels}


def with_others(new: dict[str, Any], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``new`` first, with the levels and methods that it lacks of what has as many seeds; they are not paired.

    Of what has another number of seeds, the levels that are not in ``new``.
    """
    left = []
    for one in old:
        if one["seeds"] != new["seeds"]:
            levels = {name: level for name, level in one["levels"].items() if name not in new["levels"]}
            left += [{**one, "levels": levels}] if levels else []
            continue
        levels = dict(one["levels"])
        for name, level in new["levels"].items():
            before = levels.get(name, {"dense": None, "methods": {}, "paired": {}})
            dense = before["dense"] if level["dense"] is None else level["dense"]
            paired = before["paired"] | level["paired"]
            levels[name] = {"dense": dense, "methods": before["methods"] | level["methods"], "paired": paired}
        new = {**new, "levels": levels}
    return [new, *left]


def main() -> None:
    """Add what is new, and write block and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="FOLDER")
    parser.add_argument("--part", help="of a grid of fine-tuning, as sgd/200")
    names = ("network", "data", "budget", "anchor")
    for name in names:
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    kept = experiments()
    if options.add:
        about = {name: getattr(options, name) for name in names}
        if None in about.values():
            parser.error("--add needs --network, --data, --budget and --anchor")
        values = fine_tuned(options.add, options.part) if options.part else compared(options.add)
        new = kept_of(values, about)
        same = [one for one in kept if all(one[name] == new[name] for name in names[:3])]
        kept = [*with_others(new, same), *(one for one in kept if one not in same)]
        KEPT.write_text("[\n" + ",\n".join(json.dumps(one) for one in kept) + "\n]\n", "utf-8")
    page = PAGE.read_text("utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + block(kept) + END, page, flags=re.S), "utf-8")
    draw(kept)


if __name__ == "__main__":
    main()

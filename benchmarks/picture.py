"""The README's picture: accuracy and time against sparsity, from the tables of docs/results.md and docs/performance.md.

python benchmarks/picture.py        # writes docs/figures/sparsity.svg and .png
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent.parent / "docs"
#: Methods of the picture, and how they are drawn.
STYLES = {"mirror": ("#3949ab", "-", 2.4), "gmp": ("#8d6e63", "--", 1.6), "rigl": ("#9e9e9e", ":", 1.6)}


def rows(page: str, header: str) -> tuple[list[str], dict[str, list[str]]]:
    """The first table of the page whose header begins so: its columns, and its rows by their first cell."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(header):
            break
    else:
        raise ValueError(f"docs/{page} has no table that begins with {header!r}")
    columns = _cells(line)[1:]
    next(lines)
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = _cells(line)
        table[name.strip("`")] = cells
    return columns, table


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def percents(columns: list[str]) -> list[tuple[int, float]]:
    """Which columns are sparsities, in %."""
    return [(i, float(column[:-1])) for i, column in enumerate(columns) if re.fullmatch(r"[\d.]+%", column)]


def main() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    columns, table = rows("results.md", "| test accuracy, % |")
    ticks = percents(columns)
    places = range(len(ticks))
    for name, (colour, line, width) in STYLES.items():
        found = [re.findall(r"[\d.]+", table[name][i]) for i, _ in ticks]
        means, bounds = [float(cell[0]) for cell in found], [float(cell[1]) for cell in found]
        left.errorbar(places, means, bounds, color=colour, linestyle=line, linewidth=width, capsize=3, label=name)
    dense = float(table["dense"][0].split()[0])
    left.axhline(dense, color="black", linewidth=1, label="dense")
    left.set_xticks(list(places), [f"{percent:g}%" for _, percent in ticks])
    left.set(title="LeNet-300-100, Fashion-MNIST", xlabel="sparsity", ylabel="test accuracy, %")
    left.legend(frameon=False, loc="lower left")

    columns, table = rows("performance.md", "| one thread, processor time | best dense |")
    cells = table["resnet18-b1"]
    engine, best = cells[0].split()[:2]
    times = [(percent, cells[i]) for i, percent in percents(columns) if cells[i]]
    values = [float(cell.split()[0]) for _, cell in times]
    right.bar(range(len(times)), values, color=STYLES["mirror"][0])
    for place, value in enumerate(values):
        right.annotate(f"{value:g}", (place, value), ha="center", va="bottom")
    right.axhline(float(best), color="black", linewidth=1, label=f"best dense engine ({engine})")
    right.set_xticks(range(len(times)), [f"{percent:g}%" for percent, _ in times])
    right.set(title="ResNet-18, one image, one core", xlabel="sparsity", ylabel="milliseconds")
    right.set_ylim(0, 1.2 * max(values))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "figures" / "sparsity.svg", metadata={"Date": None})
    figure.savefig(DOCS / "figures" / "sparsity.png", dpi=140)


if __name__ == "__main__":
    main()

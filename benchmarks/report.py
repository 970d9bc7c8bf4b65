"""The size of a page of many runs, and how long it takes to open in Chromium.

    python benchmarks/report.py                                      # 500 made-up runs: size, time to write and open
    python benchmarks/report.py --picture report.png runs/mine       # a picture of the page about real runs

Opening is measured from the navigation's start to the moment when every script has run and the charts in view are
drawn, in a new browser each time, after one that is not counted; the median and the range over --rounds. The picture
is of the top of the page at 1280 pixels; --dark and --width change it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mirrormask.environment import processor
from mirrormask.report.page import report

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "report"))
import browser as chromium
import synthetic_runs

METHODS = ("mirror", "pilot", "spred", "gmp", "str", "magnitude", "rigl")
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
#: The layers of ResNet-20.
SHAPES = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 64)} | {
    f"layer{stage}.{block}.conv{k}.weight": (8 << stage, 8 << stage, 3, 3)
    for stage in (1, 2, 3)
    for block in range(3)
    for k in (1, 2)
}


def make(folder: Path, runs: int) -> int:
    """Write at least ``runs`` runs of a grid of seven methods and seven sparsities, with long logs; their number."""
    seeds = -(-runs // (len(METHODS) * len(SPARSITIES) + 1))
    classes = [f"class {i}" for i in range(10)]
    settings = {"epochs": 40, "lines": 10, "images": 10_000, "classes": classes, "shapes": SHAPES, "timed": True}
    return synthetic_runs.make_grid(folder, METHODS, SPARSITIES, seeds, **settings)


def opening(page: Path, rounds: int) -> list[float]:
    """Seconds until the page is ready, in a new browser each time."""
    times = []
    for _ in range(rounds + 1):
        driver = chromium.start(1280, 900)
        try:
            driver.get(page.resolve().as_uri())
            chromium.wait_for_charts(driver)
            times.append(
                driver.execute_script("return window.performance.getEntriesByName('drawn')[0].startTime") / 1e3
            )
        finally:
            driver.quit()
    return times[1:]


def picture(page: Path, out: Path, *, width: int, height: int, dark: bool) -> None:
    """Save the top of the page as a PNG."""
    driver = chromium.start(width, height, dark=dark, scale=2)
    try:
        driver.get(page.resolve().as_uri())
        chromium.wait_for_charts(driver)
        driver.save_screenshot(str(out))
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="real runs; without any, made-up ones")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path, help="save the top of the page here instead of measuring")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1240)
    parser.add_argument("--dark", action="store_true")
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, page = Path(name), Path(name) / "report.html"
        if not values.folders:
            make(folder / "runs", values.runs)
        start = time.perf_counter()
        written = report(values.folders or [folder / "runs"], page)
        seconds = time.perf_counter() - start
        if values.picture:
            picture(page, values.picture, width=values.width, height=values.height, dark=values.dark)
            print(f"{values.picture}: {written.runs} runs")
            return
        times = opening(page, values.rounds)
        print(f"{processor()}; {chromium.version()}")
        print(f"{written.runs} runs: {written.size / 1e6:.2f} MB, written in {seconds:.1f} s")
        spread = f"{min(times):.2f} to {max(times):.2f} over {len(times)}"
        print(f"opens in {statistics.median(times):.2f} s ({spread})")


if __name__ == "__main__":
    main()

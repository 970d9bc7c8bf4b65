"""``mirrormask.compile`` against eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, dense: in fp32 and in INT8.

    python benchmarks/runtime.py                                   # every network and sparsity, one thread and all
    python benchmarks/runtime.py --networks mlp-b1 --sparsities 0.95 --threads 1

The dense engines gain nothing from zeros, hence they are prepared once per network and take turns with the compiled
models of all sparsities, in one run; with several threads each turn begins after a rest in which other engines' threads
stop spinning. A ratio is the best dense engine's time over ours, both medians over the turns, or both the fastest turn:
once over those in fp32, once over those in INT8 (OpenVINO by NNCF, ONNX Runtime; calibrated on the input). The
break-even sparsity is from where on ours is faster, between the measured ones on a straight line.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mirrormask as mm
from mirrormask.machine.cache import processor_name
from networks import NETWORKS, build
from turns import CLOCKS, ENGINES, INT8_ENGINES, STATISTICS, race


def break_even(times: dict[float, float], rival: float) -> float | None:
    """From which sparsity on, up to the highest measured one, a call takes less than ``rival``; None for nowhere.

    >>> break_even({0.0: 10.0, 0.8: 6.0, 0.9: 2.0}, 4.0)
    0.85
    >>> break_even({0.0: 1.0, 0.9: 0.5}, 4.0), break_even({0.9: 5.0}, 4.0)
    (0.0, None)
    """
    points = sorted(times.items(), reverse=True)
    found = None
    for sparsity, seconds in points:
        if seconds >= rival:
            if found is None:
                return None
            share = (seconds - rival) / (seconds - times[found])
            return round(sparsity + share * (found - sparsity), 4)
        found = sparsity
    return found


def measure(
    name: str, sparsities: list[float], threads: int, engines: list[str], rounds: int, clock: str
) -> list[dict[str, object]]:
    """A result for each statistic."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    dense, x = build(NETWORKS[name], 0.0)
    built = {}
    ours: dict[str, Callable[[], object]] = {}
    for sparsity in sparsities:
        model, x = build(NETWORKS[name], sparsity)
        start = time.perf_counter()
        fast = mm.compile(model, x)
        built[sparsity] = (time.perf_counter() - start, fast.report)
        ours[f"{sparsity}"] = functools.partial(fast, x)
    turns, missing = race(dense, x, ours, threads=threads, engines=engines, rounds=rounds, clock=clock)
    weights = 4 * sum(p.numel() for p in dense.parameters())
    results: list[dict[str, object]] = []
    for statistic, choose in STATISTICS.items():
        seconds = {key: choose(times) for key, times in turns.items()}
        others = {key: seconds[key] for key in engines if key in seconds and key in ENGINES}
        narrow = {key: seconds[key] for key in engines if key in seconds and key in INT8_ENGINES}
        own = {sparsity: seconds[f"{sparsity}"] for sparsity in sparsities}
        rows = [
            {
                "sparsity": sparsity,
                "seconds": seconds[f"{sparsity}"],
                "ratio": min(others.values()) / seconds[f"{sparsity}"],
                "over_int8": min(narrow.values()) / seconds[f"{sparsity}"] if narrow else None,
                "over_eager": others["eager"] / seconds[f"{sparsity}"] if "eager" in others else None,
                "compiled": report.compiled,
                "error": report.error,
                "memory_over_dense_weights": report.nbytes / weights,
                "build_seconds": took,
                "cached": report.cached,
            }
            for sparsity, (took, report) in built.items()
        ]
        facts = {"network": name, "threads": threads, "processor": processor_name(), "clock": clock}
        even = {
            "fp32": break_even(own, min(others.values())),
            "int8": break_even(own, min(narrow.values())) if narrow else None,
        }
        measured = {"dense_seconds": others, "int8_seconds": narrow, "break_even": even, "missing": missing}
        results.append({**facts, "statistic": statistic, **measured, "rows": rows})
    return results


def show(result: dict) -> None:
    dense = ", ".join(f"{key} {1e3 * s:.3f}" for key, s in result["dense_seconds"].items())
    facts = f"{result['threads']} thread(s), {result['statistic']} {result['clock']} time, {result['processor']}"
    print(f"\n{result['network']}, {facts}")
    print(f"dense ms: {dense}")
    if result["int8_seconds"]:
        print("int8 ms: " + ", ".join(f"{key} {1e3 * s:.3f}" for key, s in result["int8_seconds"].items()))
    for kind, at in result["break_even"].items():
        print(f"faster than the best in {kind} from {'no measured sparsity' if at is None else f'{at:.1%} zeros'} on")
    for key, why in result["missing"].items():
        print(f"  {key} not measured: {why}")
    print(f"{'sparsity':>9}{'ms':>10}{'ratio':>8}{'int8 x':>8}{'eager x':>9}{'error':>10}{'memory':>8}{'build s':>9}")
    for row in result["rows"]:
        note = "" if row["compiled"] else "  (runs as it was)"
        print(
            f"{row['sparsity']:>9}{1e3 * row['seconds']:>10.3f}{row['ratio']:>8.2f}{row['over_int8'] or 0:>8.2f}"
            f"{row['over_eager'] or 0:>9.2f}{row['error']:>10.1e}{row['memory_over_dense_weights']:>8.2f}"
            f"{row['build_seconds']:>9.2f}{' cached' if row['cached'] else ''}{note}",
            flush=True,
        )


def markdown(path: Path) -> None:
    """Print the tables of a file that ``--out`` wrote."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    for threads, statistic in itertools.product(sorted({r["threads"] for r in results}), STATISTICS):
        chosen = [r for r in results if (r["threads"], r["statistic"]) == (threads, statistic)]
        columns = [row["sparsity"] for row in chosen[0]["rows"]]
        print(f"\n{threads} thread{'s' if threads > 1 else ''}, {statistic}\n")
        print("| network | best dense | best INT8 | " + " | ".join(f"{100 * c:g}%" for c in columns) + " | even |")
        print("|---|---|---|" + "---|" * (len(columns) + 1))
        for r in chosen:
            best = min(r["dense_seconds"], key=lambda key: r["dense_seconds"][key])
            over = {row["sparsity"]: f" ({row['over_eager']:.1f})" if row["over_eager"] else "" for row in r["rows"]}
            narrow = r.get("int8_seconds") or {}
            least = min(narrow, key=lambda key: narrow[key], default="")
            int8 = f"{least.removesuffix('-int8')} {1e3 * narrow[least]:.3g} ms" if least else ""
            even = ", ".join("none" if at is None else f"{at:.0%}" for at in r.get("break_even", {}).values())
            cells = [
                f"{1e3 * row['seconds']:.3g} ms, {row['ratio']:.2f}"
                + (f" / {row['over_int8']:.2f}" if row.get("over_int8") else "")
                + over[row["sparsity"]]
                for row in r["rows"]
            ]
            dense = f"{best} {1e3 * r['dense_seconds'][best]:.3g} ms"
            print(f"| {r['network']} | {dense} | {int8} | " + " | ".join(cells) + f" | {even} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--engines", nargs="+", default=[*ENGINES, *INT8_ENGINES], choices=[*ENGINES, *INT8_ENGINES])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="processor time is not lengthened by others' work on a shared machine; for one thread only",
    )
    parser.add_argument("--out", type=Path, help="append one JSON line per network and thread count to this file")
    parser.add_argument("--table", type=Path, help="only print the Markdown tables of a file that --out wrote")
    options = parser.parse_args()
    if options.table:
        markdown(options.table)
        return
    if options.clock == "processor" and options.threads != [1]:
        parser.error("--clock processor adds up threads; give it --threads 1")
    for threads in options.threads:
        for name in options.networks:
            for result in measure(name, options.sparsities, threads, options.engines, options.rounds, options.clock):
                show(result)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

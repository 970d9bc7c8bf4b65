"""``mirrormask.compile`` on networks that nobody here chose, beside eager PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/zoo.py --clock processor --json zoo.jsonl                 # all of them
    python benchmarks/zoo.py --only resnet18,bert --rounds 5 --no-engines
    python benchmarks/zoo.py --check --json zoo.jsonl                           # errors and regions, nothing timed
    python benchmarks/zoo.py --table zoo.jsonl                                  # the last row of each network in a file

Each network is built in a process of its own with an empty cache, and in a second one from that cache, where it takes
turns with the engines; all on one thread, batch 1, in fp32. One that raises, crashes, takes too long or too much memory
is a row. The columns:

    sparse      the share of the model's products that is in the sparsified matrices
    regions     native regions; 1 with next to nothing outside is a network without a crossing
    error       the largest difference from eager over the largest output, on the example and on another input; in
                brackets how far this is from float64, and how far eager is, on the example
    outside     the share of a call's time that is spent outside the regions; all where the model runs as it was
    cold, warm  seconds of a build in a fresh process, imports included: with an empty cache, and from it; in brackets
                processor seconds of the first
    build MB    the peak of the build, beside the model, the imports and the plan; in brackets over the model's weights
    plan        memory of the plan over the model's weights
    over best   the best dense engine's time over ours
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zoo_networks import ZOO, build, example

if TYPE_CHECKING:
    from mirrormask.runtime import CompiledModel

Row = dict[str, Any]

#: The other engines of the table, eager PyTorch aside.
OTHERS = ("onnxruntime", "openvino")
#: A model that runs as it was takes eager's time but for chance, which is not slower.
SLOWER = 0.97
#: The share of the time outside of a network that counts as one region: its embeddings and its own Python.
ASIDE = 0.1
#: The bar on the error, and how many times farther from float64 than eager PyTorch the rest may be: the order of sums.
EXACT, TIMES = 1e-5, 2.0
#: Seconds that the turns of all engines take at most.
TURNS = 90.0


class ProductShare(TorchDispatchMode):
    """Counts the products of a forward pass: all, and those with one of ``matrices``."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__()
        self.storages = {w.untyped_storage().data_ptr() for w in matrices}
        self.all = self.sparse = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.all += flops
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.sparse += flops * any(t.untyped_storage().data_ptr() in self.storages for t in tensors)
        return result


def product_share(model: nn.Module, x: Tensor, matrices: list[Tensor]) -> float:
    """The share of a model's products that is in these matrices."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Fused attention and LSTMs would hide their products.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), ProductShare(matrices) as share:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return share.sparse / share.all if share.all else 0.0


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def error(got: Any, expected: Any) -> float:
    """The largest difference over the largest expected element, the worst of all outputs."""
    worst = 0.0
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        difference = float((a - b).abs().max() / b.abs().max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def in_float64(model: nn.Module, x: Tensor) -> Any:
    """The network's result in float64; None where it has no such form."""
    try:
        return copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    except RuntimeError:  # it makes float32 tensors as it goes
        return None


def outside(fast: CompiledModel, x: Tensor, regions: list[nn.Module]) -> float:
    """The share of a call's time that is not spent in ``regions``: PyTorch's operations, and the way there and back."""
    clock = time.thread_time
    inside = 0.0

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            nonlocal inside
            start = clock()
            result = forward(*inputs)
            inside += clock() - start
            return result

        return run

    for region in regions:
        region.forward = timed(region.forward)
    shares = []
    for _ in range(7):
        inside, start = 0.0, clock()
        fast(x)
        shares.append(1.0 - inside / (clock() - start))
    for region in regions:
        del region.forward
    # A model that is one region goes straight to its code, past ``forward``.
    return 0.0 if regions and inside == 0.0 else statistics.median(shares)


def status_bytes(field: str) -> int:
    """A field of Linux's account of this process; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Child:
    """One stage of one network in a process of its own; what is known so far goes to a file at once."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.network, self.options = ZOO[name], options
        self.phase = "the start"

    def say(self, **facts: Any) -> None:
        with self.options.child.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.say(phase=phase)

    def run(self) -> None:
        """The stage; an exception is a fact as others are."""
        limit = int(self.options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                self.cold() if self.options.stage == "cold" else self.warm()
        except Exception as problem:
            first = str(problem).strip().partition("\n")[0]
            self.say(failed=f"{type(problem).__name__}: {first}", failed_in=self.phase)

    def make(self) -> tuple[nn.Module, Tensor, list[Tensor]]:
        self.enter("making the network")
        package = self.network.package
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed; pip install 'mirrormask[benchmarks]'")
        model, chosen = build(self.network, self.options.sparsity, self.options.vocabulary)
        return model, example(self.network, model, self.options.vocabulary), list(chosen.values())

    def cold(self) -> None:
        """The first build ever, and what the plan is like."""
        model, x, matrices = self.make()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.say(weights=weights, sparse=product_share(model, x, matrices))
        other = example(self.network, model, self.options.vocabulary)
        expected = [model(x), model(other)]
        exact = in_float64(model, x)
        if not all(t.isfinite().all() and t.std() > 0 for t in tensors(expected)):
            raise ArithmeticError("the network's own output is constant or not finite")
        self.enter("mm.compile")
        start, used = time.perf_counter(), time.process_time()
        import mirrormask as mm

        # What any build loads (LLVM and torch.export, 100 MB) is not this network's memory; the time of it counts.
        mm.compile(nn.Linear(8, 8).eval(), torch.zeros(2, 8), tune=False)
        before = status_bytes("VmRSS")
        forget_peak()
        check = self.options.check
        fast = mm.compile(model, x, tune=not check, force=check)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        beside = status_bytes("VmHWM") - before - fast.report.nbytes
        report = fast.report
        self.say(
            cold=seconds,
            cpu=used,
            beside=max(0, beside),
            plan=report.nbytes,
            compiled=report.compiled,
            reason=report.reason,
            left=report.left,
            error=report.error,
            processor=report.processor,
        )
        self.enter("calling the compiled model")
        found = [error(fast(given), want) for given, want in zip((x, other), expected, strict=True)]
        self.say(error=max(report.error, *found))
        if exact is not None:
            self.say(our_error=error(fast(x), exact), eager_error=error(expected[0], exact))
        regions = fast.regions
        self.say(regions=report.regions, outside=outside(fast, x, regions))

    def warm(self) -> None:
        """The build from the cache, and the race."""
        model, x, _ = self.make()
        self.enter("mm.compile from the cache")
        start = time.perf_counter()
        import mirrormask as mm

        fast = mm.compile(model, x)
        self.say(warm=time.perf_counter() - start, cached=fast.report.cached)
        self.enter("the race")
        from turns import STATISTICS, race

        options = self.options
        engines = ("eager",) if options.no_engines else ("eager", *OTHERS)
        ours: dict[str, Callable[[], object]] = {"mirrormask": lambda: fast(x)}
        race_options = {"rounds": options.rounds, "clock": options.clock, "limit": TURNS}
        times, missing = race(model, x, ours, threads=1, engines=engines, **race_options)
        choose = STATISTICS[options.statistic]
        self.say(seconds={engine: choose(turns) for engine, turns in times.items()}, missing=missing)


def run_child(name: str, stage: str, cache: str, seconds: float, options: argparse.Namespace) -> Row:
    """What a stage found, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        facts, log = Path(folder, "facts"), Path(folder, "log")
        facts.touch()
        command = [sys.executable, __file__, "--only", name, "--stage", stage, "--child", str(facts)]
        for option in ("rounds", "clock", "statistic", "sparsity", "vocabulary", "memory"):
            command += [f"--{option}", str(getattr(options, option))]
        command += ["--no-engines"] * options.no_engines + ["--check"] * options.check
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
        environment = {**os.environ, **one, "MIRRORMASK_CACHE": cache}
        row: Row = {}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(1.0, seconds))
                ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                code, ended = -1, f"stopped after {options.timeout:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for line in facts.read_text().splitlines():
            row.update(json.loads(line))
        if code and "failed" not in row:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            hint = f" ({said[-1].strip()[:100]})" if said and not ended.startswith("stopped") else ""
            row |= {"failed": ended + hint, "failed_in": row.get("phase", "the start")}
        return row


def measure(name: str, options: argparse.Namespace) -> Row:
    """A row of the table."""
    start = time.monotonic()
    row: Row = {"network": name}
    with tempfile.TemporaryDirectory() as cache:
        for stage in ("cold",) if options.check or not options.rounds else ("cold", "warm"):
            row |= run_child(name, stage, cache, options.timeout + start - time.monotonic(), options)
            if "failed" in row:
                break
    return row


def ratio(row: Row) -> float | None:
    """The best dense engine's time over ours."""
    seconds = row.get("seconds", {})
    others = [taken for engine, taken in seconds.items() if engine != "mirrormask"]
    return min(others) / seconds["mirrormask"] if others and "mirrormask" in seconds else None


def note(row: Row) -> str:
    """What a row has to say besides."""
    if "failed" in row:
        return f"**{row['failed_in']}:** {row['failed'][:200]}".replace("|", "\\|")
    notes = [] if row["compiled"] else [f"runs as it was: {row['reason']}"]
    if row["left"]:
        notes.append(f"in PyTorch: {', '.join(dict.fromkeys(name.partition(' in ')[0] for name, _ in row['left']))}")
    notes += [f"{engine}: {why}" for engine, why in row.get("missing", {}).items()]
    return "; ".join(notes).replace("|", "\\|")


def cells(row: Row) -> list[str]:
    def cell(key: str, form: str, by: int = 1) -> str:
        return format(row[key] * by, form) if key in row else ""

    seconds = row.get("seconds", {})
    times = [f"{1e3 * seconds[e]:.3g}" if e in seconds else "" for e in ("eager", *OTHERS, "mirrormask")]
    over, regions = ratio(row), cell("regions", "d")
    unplanned = "compiled" in row and not row["compiled"]
    build, plan, distances = "", "", ""
    if "our_error" in row:
        distances = f" ({row['our_error']:.1e}, {row['eager_error']:.1e})"
    if "beside" in row:
        build = f"{row['beside'] / 1e6:.0f} ({row['beside'] / row['weights']:.1f})"
        plan = f"{row['plan'] / row['weights']:.2f}"
    return [
        row["network"],
        cell("sparse", ".0f", 100) + "%" * ("sparse" in row),
        "none" if unplanned else regions,
        cell("error", ".1e") + distances,
        cell("outside", ".0f", 100) + "%" * ("outside" in row),
        cell("cold", ".1f") + (f" ({row['cpu']:.1f})" if "cpu" in row else ""),
        cell("warm", ".2f") + " (not cached)" * (row.get("cached") is False),
        build,
        plan,
        *times,
        "" if over is None else f"{over:.2f}",
        note(row),
    ]


HEAD = ["network", "sparse", "regions", "error", "outside", "cold s", "warm s", "build MB", "plan"]
HEAD += ["eager ms", "ORT ms", "OpenVINO ms", "ours ms", "over best", "notes"]


def summary(rows: list[Row]) -> str:
    """The bars of the table in a few lines, and who misses them."""

    def names(chosen: list[Row]) -> str:
        return f"{len(chosen)}" + (f": {', '.join(row['network'] for row in chosen)}" if chosen else "")

    failed = [row for row in rows if "failed" in row]
    built = [row for row in rows if "compiled" in row]
    raced = [row for row in rows if ratio(row) is not None]
    slower = [row for row in raced if row["seconds"]["eager"] < SLOWER * row["seconds"]["mirrormask"]]
    whole = [row for row in built if row["compiled"] and row.get("regions") == 1 and row["outside"] < ASIDE]
    above = [row for row in built if not row["error"] <= EXACT]
    farther = [row for row in above if not row.get("our_error", math.inf) <= TIMES * row["eager_error"]]
    lines = [
        f"{len(rows)} networks; {len(built)} compile, {len(whole)} of them in one region",
        f"fail: {names(failed)}",
        f"run as they were: {names([row for row in built if not row['compiled']])}",
        f"error above {EXACT:g}: {names(above)}",
        f"of these {TIMES:g} times as far from float64 as eager: {names(farther)}",
        f"slower than eager: {names(slower)}",
    ]
    if raced:
        mean = statistics.geometric_mean([ratio(row) or 1.0 for row in raced])
        lines.append(f"over the best dense engine: geometric mean {mean:.2f} over {len(raced)} networks")
        low = [row for row in raced if row["sparse"] >= 0.8 and (ratio(row) or 0.0) < 2.0]
        lines.append(f"of those with 80% of the products sparse, below 2: {names(low)}")
    return "\n".join(f"- {line}" for line in lines)


def table(rows: list[Row]) -> str:
    order = list(ZOO)
    rows = sorted(rows, key=lambda row: order.index(row["network"]))
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + summary(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ZOO), help="names with commas between")
    parser.add_argument("--rounds", type=int, default=9, help="0 to build from an empty cache and no more")
    parser.add_argument("--no-engines", action="store_true", help="beside eager PyTorch")
    parser.add_argument("--check", action="store_true", help="errors and regions alone: no tuning, no race")
    parser.add_argument("--json", type=Path, help="append one JSON line per network to this file")
    parser.add_argument("--table", type=Path, help="only print the table of a file that --json wrote")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one network, everything together")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of addresses for one network")
    parser.add_argument("--vocabulary", type=int, default=1000, help="words of the networks for text")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"), help="as in runtime.py")
    parser.add_argument("--statistic", default="median", choices=("median", "fastest"), help="over the turns")
    parser.add_argument("--stage", choices=("cold", "warm"), help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = sorted(set(options.only) - set(ZOO))
    if unknown:
        parser.error(f"--only names {', '.join(unknown)}; known are {', '.join(ZOO)}")
    return options


def main() -> None:
    options = arguments()
    if options.child:
        Child(options.only[0], options).run()
        return
    if options.table:
        rows = {row["network"]: row for row in map(json.loads, options.table.read_text().splitlines())}
        print(table(list(rows.values())))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the child on the way out
    found = []
    for name in options.only:
        row = measure(name, options)
        found.append(row)
        print(" | ".join(filter(None, cells(row))), file=sys.stderr, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

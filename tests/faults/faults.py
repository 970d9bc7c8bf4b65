"""Runs that are killed, damaged and starved, and what becomes of them: ``python tests/faults/faults.py --kills 200``.

Each run is a process of its own on the digits, with augmentation and a checkpoint every 20 steps. A kill is a SIGKILL
at a random moment of one phase; then the run is resumed, and everything that it leaves is compared with what the run
without interruption left, bit for bit. Prints one line a kind of fault and exits with 1 if any run was lost or differs.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from mirrormask.compare.runner import IMPORTS
from mirrormask.optimizer.mask_changes import MaskChanges
from mirrormask.train import Data, Method, Model, Recipe, RunFolder, log, loop, run
from mirrormask.train.checkpoint import Checkpoints
from mirrormask.train.session import Session

METHODS = ("pilot", "mirror", "lrr", "rigl", "str")
#: Phase -> the functions whose calls it is made of.
PHASES = {
    "start": [(loop, "run")],
    "step": [(Session, "train_epoch")],
    "mask": [(MaskChanges, "prune"), (MaskChanges, "exchange")],
    "evaluation": [(Session, "evaluate")],
    "checkpoint": [(Checkpoints, "save")],
    "finish": [(loop._Run, "_finish")],
}
COMPARED = ("model.safetensors", "distributions.json", "predictions.json")
#: Of a result, what is allowed to differ.
OWN = ("seconds", "folder", "environment", "recipe")


def recipe(folder, method):
    return Recipe(
        data=Data(crop=1, flip=True),
        model=Model("mlp", {"hidden": [32]}),
        method=Method(method),
        sparsity=0.8,
        epochs=2,
        threads=1,
        log_every=10,
        checkpoint_every="20steps",
        figure=False,
        out=str(folder),
    )


def traces(folder):
    """Everything that a finished run leaves and that must not depend on how often it was interrupted."""
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in log.read(folder)]
    result = json.loads((folder / "result.json").read_text())
    kept = {k: v for k, v in result.items() if k not in OWN}
    return records, kept, *((folder / name).read_bytes() for name in COMPARED)


def forked(work):
    """Run ``work()`` in a fork of this process; its exit status, or minus the signal that killed it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            warnings.simplefilter("ignore")
            work()
            status = 0
        except OSError:
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def watched(phase, after_call):
    """Call ``after_call(number, seconds | None)`` before and after each call of a phase."""
    calls = 0
    for owner, name in PHASES[phase]:
        original = getattr(owner, name)

        def call(*args, _original=original, **kwargs):
            nonlocal calls
            number, calls = calls, calls + 1
            after_call(number, None)
            start = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                after_call(number, time.perf_counter() - start)

        setattr(owner, name, call)


def measured(folder, method):
    """The run without interruption; phase -> seconds of each call."""
    times = {phase: {} for phase in PHASES}

    def note(phase):
        def after_call(number, seconds):
            if seconds is not None:
                times[phase][number] = seconds

        return after_call

    def work():
        begun = time.perf_counter()
        for phase in PHASES:
            watched(phase, note(phase))
        original = Session.train_epoch

        def first(*args, **kwargs):
            times["start"].setdefault(0, time.perf_counter() - begun)
            return original(*args, **kwargs)

        Session.train_epoch = first
        loop.run(recipe(folder, method))
        times["start"] = {0: times["start"][0]}
        (folder / "times.json").write_text(json.dumps({p: list(t.values()) for p, t in times.items()}))

    assert forked(work) == 0, f"{method} does not train"
    return json.loads((folder / "times.json").read_text())


def kill_in(phase, number, delay):
    """Kill this process so many seconds after the call of that number begins."""

    def shoot():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def after_call(at, seconds):
        if at == number and seconds is None:
            threading.Thread(target=shoot, daemon=True).start()

    watched(phase, after_call)


def resumed(folder, method, expected):
    """``same``, ``different`` or ``lost``."""
    status = forked(lambda: run(recipe(folder, method), resume=True))
    if status or not RunFolder(folder).finished:
        return "lost"
    parts = list(folder.rglob("*.part"))
    return "same" if traces(folder) == expected and not parts else "different"


def kills(base, number, rng):
    """Kill so many runs; phase -> Counter of what became of them."""
    outcome = {phase: Counter() for phase in PHASES}
    times = {method: measured(base / f"whole-{method}", method) for method in METHODS}
    expected = {method: traces(base / f"whole-{method}") for method in METHODS}
    pairs = [(p, m) for m in METHODS for p in PHASES if times[m][p]]
    rng.shuffle(pairs)
    pairs.sort(key=lambda pair: list(PHASES).index(pair[0]))
    by_phase = {phase: [m for p, m in pairs if p == phase] for phase in PHASES}
    for i in range(number):
        phase = list(PHASES)[i % len(PHASES)]
        method = by_phase[phase][i // len(PHASES) % len(by_phase[phase])]
        calls = times[method][phase]
        at = rng.randrange(len(calls))
        delay = rng.uniform(0, calls[at])
        folder = base / "killed"
        shutil.rmtree(folder, ignore_errors=True)

        def work(phase=phase, at=at, delay=delay, folder=folder, method=method):
            kill_in(phase, at, delay)
            loop.run(recipe(folder, method))

        status = forked(work)
        found = resumed(folder, method, expected[method])
        outcome[phase][found] += 1
        outcome[phase]["killed" if status == -signal.SIGKILL else "outran the kill"] += 1
        if found != "same":
            print(f"  {method} killed in {phase}, call {at}, after {delay:.4f} s: {found}")
            shutil.copytree(folder, base / f"{found}-{i}")
        if i % 10 == 9:
            print(f"  after {i + 1} kills: {dict(sum(outcome.values(), Counter()))}", flush=True)
    return outcome, expected


def damage(base, number, rng, expected):
    """Damage the newest checkpoint of an interrupted run in so many ways; Counter of what became of it."""
    outcome = Counter()
    source = base / "interrupted"
    shutil.rmtree(source, ignore_errors=True)

    def work():
        kill_in("evaluation", 1, 0.0)
        loop.run(recipe(source, "pilot"))

    while forked(work) != -signal.SIGKILL or len(list(Checkpoints(source, recipe(source, "pilot")))) < 2:
        shutil.rmtree(source, ignore_errors=True)
    for i in range(number):
        folder = base / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        newest = next(iter(Checkpoints(folder, recipe(folder, "pilot"))))
        raw = bytearray(newest.read_bytes())
        kind = ("flipped", "truncated", "emptied", "foreign")[i % 4]
        if kind == "flipped":
            place = rng.randrange(8 * len(raw))
            raw[place // 8] ^= 1 << place % 8
        elif kind == "truncated":
            del raw[rng.randrange(len(raw)) :]
        elif kind == "emptied":
            raw = bytearray()
        else:
            raw = bytearray((folder / rng.choice(["recipe.yaml", "log.jsonl"])).read_bytes())
        newest.write_bytes(raw)
        found = resumed(folder, "pilot", expected["pilot"])
        outcome[found] += 1
        if found != "same":
            print(f"  {kind} {newest}: {found}")
    return outcome


def limits(base, number, rng, expected):
    """Let no file grow beyond so many sizes, evenly over what a run writes; then lift the limit and resume."""
    outcome = Counter()
    whole = base / "whole-pilot"
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for i in range(number):
        folder, size = base / "limited", int(64 * (1.05 * largest / 64) ** ((i + rng.random()) / number))
        shutil.rmtree(folder, ignore_errors=True)

        def work(folder=folder, size=size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            run(recipe(folder, "pilot"))

        status = forked(work)
        outcome["refused" if status == 2 else "finished" if status == 0 else f"status {status}"] += 1
        outcome[resumed(folder, "pilot", expected["pilot"])] += 1
    return outcome


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--limits", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in (*IMPORTS, "sklearn.datasets", "scipy.special"):
        importlib.import_module(name)  # once, not in every fork
    rng = random.Random(options.seed)
    base = Path(options.out or tempfile.mkdtemp(prefix="mirrormask-faults-"))
    base.mkdir(parents=True, exist_ok=True)
    outcome, expected = kills(base, options.kills, rng)
    total = Counter()
    for phase, counted in outcome.items():
        print(f"kill in {phase}: {dict(counted)}")
        total += counted
    print(f"kills: {dict(total)}")
    damaged = damage(base, options.damages, rng, expected)
    print(f"damaged checkpoints: {dict(damaged)}")
    limited = limits(base, options.limits, rng, expected)
    print(f"limits of file size: {dict(limited)}")
    good = options.kills + options.damages + options.limits
    same = total["same"] + damaged["same"] + limited["same"]
    print(f"{same} of {good} runs are the uninterrupted one, bit for bit")
    odd = [key for key in limited if key.startswith("status")]
    if options.out is None and same == good:
        shutil.rmtree(base)
    return int(same != good or bool(odd))


if __name__ == "__main__":
    sys.exit(main())

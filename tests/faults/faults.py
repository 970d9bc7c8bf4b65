"""Runs that are killed, damaged and starved, and what becomes of them: ``python tests/faults/faults.py --kills 200``.

Each run is a process of its own on the digits, and every third one on Fashion-MNIST where ``--data DIR`` names its
folder, with augmentation and a checkpoint every few steps. A kill is a SIGKILL at a random moment of one phase; then
the run is resumed, and everything that it leaves is compared with what the run without interruption left, bit for bit.
Prints one line a kind of fault and exits with 1 if any run was lost or differs. With ``--out DIR`` each outcome is
kept, and the same command goes on where the last one stopped.
"""

import argparse
import importlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from phases import PHASES, kill_in, timed
from small_runs import forked, recipe, traces

from mirrormask.compare.runner import IMPORTS
from mirrormask.train import RunFolder, loop, run
from mirrormask.train.checkpoint import Checkpoints

METHODS = ("pilot", "mirror", "lrr", "rigl", "str")
#: How often a kill that came after the run's end is tried again.
AGAIN = 20
DAMAGES = ("flipped", "truncated", "emptied", "foreign")


class Faults:
    """The uninterrupted runs, and the faults that were tried.

    Args:
        base: a folder of its own; what an earlier command with the same seed left there is not done again.
        seed: of all that is random; each fault's follows from it and its number.
        root: the folder of Fashion-MNIST, or None for the digits alone.
    """

    def __init__(self, base, seed, root):
        self.base, self.seed, self.root = base, seed, root
        base.mkdir(parents=True, exist_ok=True)
        self.wholes = {}
        self.kept = base / "outcomes.jsonl"
        lines = self.kept.read_text().splitlines() if self.kept.exists() else []
        self.outcomes = [json.loads(line) for line in lines]

    def each(self, kind, number, attempt):
        """Try ``attempt(i, rng)`` for those of ``number`` that were not tried yet; the outcomes of all."""
        done = {o["number"] for o in self.outcomes if o["kind"] == kind}
        for i in range(number):
            if i in done:
                continue
            outcome = {"kind": kind, "number": i, **attempt(i, random.Random(f"{self.seed} {kind} {i}"))}
            self.outcomes.append(outcome)
            with open(self.kept, "a") as file:
                file.write(json.dumps(outcome) + "\n")
            if outcome["found"] != "same":
                print(f"  {outcome}", flush=True)
            if i % 10 == 9:
                print(f"  {kind}: {i + 1} of {number}", flush=True)
        return [o for o in self.outcomes if o["kind"] == kind and o["number"] < number]

    def recipe(self, name, method, data):
        return recipe(self.base / name, method, data=data, root=self.root)

    def whole(self, method, data):
        """The run without interruption: what it leaves, and phase -> seconds of each call."""
        if (method, data) not in self.wholes:
            name = f"whole-{data}-{method}"
            folder, times = self.base / name, self.base / f"{name}.json"
            if not times.exists():
                shutil.rmtree(folder, ignore_errors=True)

                def work():
                    measured = timed(lambda: loop.run(self.recipe(name, method, data)))
                    times.write_text(json.dumps(measured))

                assert forked(work) == 0, f"{method} does not train on {data}"
            self.wholes[method, data] = traces(folder), json.loads(times.read_text())
        return self.wholes[method, data]

    def fresh(self, name):
        shutil.rmtree(self.base / name, ignore_errors=True)
        return self.base / name

    def resumed(self, name, method, data):
        """``same``, ``different`` or ``lost``."""
        folder = self.base / name
        status = forked(lambda: run(self.recipe(name, method, data), resume=True))
        if status or not RunFolder(folder).finished:
            return "lost"
        parts = list(folder.rglob("*.part"))
        return "same" if traces(folder) == self.whole(method, data)[0] and not parts else "different"

    def kill(self, i, rng):
        """Kill a run in the phase of that number and resume it."""
        phases, data = list(PHASES), "fashion-mnist" if self.root and i // len(PHASES) % 3 == 2 else "digits"
        phase = phases[i % len(phases)]
        methods = [m for m in METHODS if self.whole(m, data)[1][phase]]  # not every method changes its mask on the way
        method = methods[i // len(phases) % len(methods)]
        calls = self.whole(method, data)[1][phase]
        status, outran = 0, -1
        while status != -signal.SIGKILL and outran < AGAIN:
            outran += 1
            at = rng.randrange(len(calls))
            delay = rng.uniform(0, calls[at])
            self.fresh("killed")

            def work(at=at, delay=delay):
                kill_in(phase, at, delay)
                loop.run(self.recipe("killed", method, data))

            status = forked(work)
            assert status in (0, -signal.SIGKILL), f"a run that nobody touched ended with {status}"
        found = self.resumed("killed", method, data)
        if found != "same":
            shutil.copytree(self.base / "killed", self.base / f"{found}-{i}", dirs_exist_ok=True)
        return {"phase": phase, "method": method, "data": data, "call": at, "seconds": delay, "outran": outran,
                "killed": status == -signal.SIGKILL, "found": found}  # fmt: skip

    def damage(self, i, rng):
        """Damage the newest checkpoint of an interrupted run and go on."""
        while len(list(Checkpoints(self.base / "interrupted", self.recipe("interrupted", "pilot", "digits")))) < 2:
            self.fresh("interrupted")

            def work():
                kill_in("evaluation", 1, 0.0)
                loop.run(self.recipe("interrupted", "pilot", "digits"))

            forked(work)
        folder = self.fresh("damaged")
        shutil.copytree(self.base / "interrupted", folder)
        newest = next(iter(Checkpoints(folder, self.recipe("damaged", "pilot", "digits"))))
        raw = bytearray(newest.read_bytes())
        how = DAMAGES[i % len(DAMAGES)]
        if how == "flipped":
            place = rng.randrange(8 * len(raw))
            raw[place // 8] ^= 1 << place % 8
        elif how == "truncated":
            del raw[rng.randrange(len(raw)) :]
        elif how == "emptied":
            raw = bytearray()
        else:
            raw = bytearray((folder / rng.choice(["recipe.yaml", "log.jsonl"])).read_bytes())
        newest.write_bytes(raw)
        return {"how": how, "found": self.resumed("damaged", "pilot", "digits")}

    def limit(self, i, rng, number):
        """Let no file grow beyond a size, evenly over what a run writes; then lift the limit and resume."""
        self.whole("pilot", "digits")
        written = (self.base / "whole-digits-pilot").rglob("*")
        largest = max(path.stat().st_size for path in written if path.is_file())
        size = int(64 * (1.05 * largest / 64) ** ((i + rng.random()) / number))
        self.fresh("limited")

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            run(self.recipe("limited", "pilot", "digits"))

        status = forked(work)
        first = {0: "finished", 2: "refused"}.get(status, f"status {status}")
        return {"size": size, "first": first, "found": self.resumed("limited", "pilot", "digits")}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--limits", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default=None, help="the folder of Fashion-MNIST")
    parser.add_argument("--out", default=None, help="keeps the outcomes; the same command again goes on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in (*IMPORTS, "sklearn.datasets", "scipy.special", *(["torchvision"] if options.data else [])):
        importlib.import_module(name)  # once, not in every fork
    base = Path(options.out or tempfile.mkdtemp(prefix="mirrormask-faults-"))
    faults = Faults(base, options.seed, options.data)
    killed = faults.each("kill", options.kills, faults.kill)
    for key in ("phase", "data", "method"):
        counted = Counter((o[key], o["found"]) for o in killed if o["killed"])
        print(f"kills by {key}:", ", ".join(f"{name} {n} {found}" for (name, found), n in sorted(counted.items())))
    print(f"came after the run's end and were tried again: {sum(o['outran'] for o in killed)}")
    damaged = faults.each("damage", options.damages, faults.damage)
    print(f"damaged checkpoints: {dict(Counter((o['how'] + ' ' + o['found']) for o in damaged))}")
    limited = faults.each("limit", options.limits, lambda i, rng: faults.limit(i, rng, options.limits))
    print(f"limits of file size: {dict(Counter((o['first'] + ', then ' + o['found']) for o in limited))}")
    everything = [*killed, *damaged, *limited]
    same = sum(o["found"] == "same" for o in everything)
    print(f"{same} of {len(everything)} runs are the uninterrupted one, bit for bit")
    good = same == len(everything) and all(o["killed"] for o in killed)
    good &= all(o["first"] in ("finished", "refused") for o in limited)
    if options.out is None and good:
        shutil.rmtree(base)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

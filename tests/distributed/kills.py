"""Processes of a run that are killed, and what becomes of the others: ``python tests/distributed/kills.py --kills 30``.

A run of 2 or 4 processes is forked; one of them is killed by SIGKILL at a random moment of a step, a change of the
mask, a checkpoint, an evaluation or the end. Every other one has to end with the error that names this within a
minute. Then the run is resumed by 1, 2 or 4 processes, and its loss curve has to be that of the run that nobody
touched, to rounding. Prints one line a phase and exits with 1 if anything was otherwise.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from phases import PHASES, kill_in, timed
from small_runs import recipe

from mirrormask.compare.runner import IMPORTS
from mirrormask.train import RunFolder, log, loop
from mirrormask.train.parallel import LostProcess

METHODS = ("gmp", "mirror", "rigl", "acdc")
#: How many processes are started, and by how many the run is resumed.
WORLDS = ((2, 1), (2, 2), (2, 4), (4, 2))
NAMES = ("step", "mask", "checkpoint", "evaluation", "finish")
#: Seconds in which the others have to end.
MINUTE = 60.0
#: The exit status of a process that ended with the right error.
TOLD = 3


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(size, work):
    """Fork so many processes that call ``work(rank)``; their ids."""
    port, children = str(free_port()), []
    sys.stdout.flush()
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 70
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            if size > 1:
                os.environ |= {key: str(value) for key, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            work(rank)
            status = 0
        except LostProcess as error:
            status = TOLD if "has ended in its middle" in str(error) and "--resume true" in str(error) else 4
        except BaseException as error:
            print(f"  rank {rank} of {size}: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return children


def ended(children, seconds):
    """The exit status of each, None for one that had to be killed after so many seconds."""
    found, limit = {}, time.monotonic() + seconds
    while len(found) < len(children) and time.monotonic() < limit:
        for child in set(children) - set(found):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(found):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [found.get(child) for child in children]


def curve(folder):
    """What the log says of the training, whoever did it."""
    records = [r for r in log.read(folder) if r["event"] in ("step", "epoch", "final")]
    return [(r["event"], r["step"], r["loss"], r["sparsity"]) for r in records]


def alike(found, expected):
    """Whether two curves are one, up to what sums in another order give in 90 steps."""
    if [line[:2] for line in found] != [line[:2] for line in expected]:
        return False
    return all(abs(a - b) <= 2e-3 + 5e-3 * abs(b) for x, y in zip(found, expected, strict=True)
               for a, b in zip(x[2:], y[2:], strict=True))  # fmt: skip


def untouched(folder, method):
    """The run of one process; phase -> seconds of each call."""

    def work(_):
        times = timed(lambda: loop.run(recipe(folder, method)))
        (folder / "times.json").write_text(json.dumps(times))

    assert ended(started(1, work), 600) == [0]
    return json.loads((folder / "times.json").read_text()), curve(folder)


def kill(base, index, rng, wholes):
    """One kill: (phase, what became of it, seconds until the others had ended)."""
    phase, method = NAMES[index % len(NAMES)], METHODS[index // len(NAMES) % len(METHODS)]
    (size, after), parallel = WORLDS[index % len(WORLDS)], ("ddp", "fsdp")[index // 2 % 2]
    if method not in wholes:
        wholes[method] = untouched(base / f"whole-{method}", method)
    times, expected = wholes[method]
    at = rng.randrange(len(times[phase])) if times[phase] else 0
    # The first process alone writes checkpoints.
    victim, delay = (
        0 if phase == "checkpoint" else rng.randrange(size),
        rng.uniform(0, times[phase][at] if times[phase] else 0),
    )
    folder = base / "killed"
    shutil.rmtree(folder, ignore_errors=True)

    def work(rank):
        if rank == victim:
            kill_in(phase, at, delay)
        loop.run(recipe(folder, method, parallel=parallel))

    children = started(size, work)
    (own,) = ended([children[victim]], 600)
    died = time.monotonic()
    others = ended([child for child in children if child != children[victim]], MINUTE)
    seconds = time.monotonic() - died
    what = f"{method} {parallel}, rank {victim} of {size} in {phase} {at}, resumed by {after}"
    if own != -signal.SIGKILL:
        found = "outran the kill" if own == 0 and set(others) == {0} else f"ended with {own} and {others}"
    elif not set(others) <= ({TOLD, 0} if RunFolder(folder).finished else {TOLD}):
        found = f"the others ended with {others}"
    else:
        found = "told"
    if found in ("told", "outran the kill"):
        statuses = ended(
            started(after, lambda _: loop.run(recipe(folder, method, parallel=parallel), resume=True)), 600
        )
        if set(statuses) != {0} or not RunFolder(folder).finished:
            found = f"lost: {statuses}"
        elif not alike(curve(folder), expected):
            found = "different"
    if found not in ("told", "outran the kill"):
        shutil.copytree(folder, base / f"odd-{index}", dirs_exist_ok=True)
    print(f"  {what}: {found}, after {seconds:.1f} s", flush=True)
    return phase, found, seconds


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="the number of the first: what is done follows from it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in (*IMPORTS, "sklearn.datasets", "scipy.special", "torch.distributed.fsdp"):
        importlib.import_module(name)  # once, not in every fork
    base, wholes, outcome, slowest = Path(tempfile.mkdtemp(prefix="mirrormask-kills-")), {}, {}, 0.0
    rng = random.Random(options.seed)
    for index in range(options.first, options.first + options.kills):
        phase, found, seconds = kill(base, index, rng, wholes)
        outcome.setdefault(phase, Counter())[found] += 1
        slowest = max(slowest, seconds)
    for phase, counted in outcome.items():
        print(f"{phase}: {dict(counted)}")
    total = sum(outcome.values(), Counter())
    good = total["told"] + total["outran the kill"]
    print(f"{good} of {options.kills} runs went on as the one that nobody touched; the others ended within "
          f"{slowest:.1f} s")  # fmt: skip
    if good == options.kills:
        shutil.rmtree(base)
    return int(good != options.kills)


assert set(NAMES) <= set(PHASES)

if __name__ == "__main__":
    sys.exit(main())

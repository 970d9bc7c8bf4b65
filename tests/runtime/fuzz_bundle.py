"""Forged models, correctly checksummed: ``python fuzz_bundle.py FILE SECONDS SEED`` loads and runs mutants of a file.

Each must be refused by a FormatError, or run (or refuse its example by name), within the memory that the process is
given. Prints how many of each there were.
"""

import copy
import io
import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np

import mirrormask as mm
from mirrormask.runtime.bundle.read import KEY
from mirrormask.storage.contents import PREFIX
from mirrormask.storage.plan import Form, make_plan
from mirrormask.storage.reader import read_contents

NUMBERS = [0, 1, 2, 3, 7, 8, 64, 65, 255, 4096, 1 << 31, 1 << 40, (1 << 63) - 1, -1, -8, -(1 << 31)]
OTHERS = [None, True, "", "x", "0x1p+3", "nan", "inf", [], {}, [1], {"node": "x"}]


def places(value, path=()):
    """The path of every value in a JSON tree."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


def mutated(said, chance):
    said = copy.deepcopy(said)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice([path for path in places(said) if len(path) > 1] or [("version",)])
        holder = said
        for key in path[:-1]:
            holder = holder[key]
        old, kind = holder.get(path[-1]) if isinstance(holder, dict) else holder[path[-1]], chance.random()
        if kind < 0.15:
            holder.pop(path[-1], None) if isinstance(holder, dict) else holder.pop(path[-1])
        elif kind < 0.6 and isinstance(old, int):
            holder[path[-1]] = chance.choice([*NUMBERS, old + 1, old - 1, 2 * old])
        elif kind < 0.85:  # something of the same kind from elsewhere
            same = [p for p in places(said) if p]
            other = said
            for key in chance.choice(same):
                other = other[key]
            holder[path[-1]] = copy.deepcopy(other)
        else:
            holder[path[-1]] = chance.choice(OTHERS)
    return said


def written(state, said):
    """The bytes of a file with these tensors that says this."""
    plan = make_plan(state, None, None, Form(), more={KEY.removeprefix(PREFIX): json.dumps(said)})
    out = io.BytesIO()
    out.write(plan.header)
    for array in plan.arrays():
        out.write(array.view(np.uint8).data)
    return out.getvalue()


def main(path, seconds, seed):
    state, said = mm.load(path), json.loads(read_contents(path).metadata[KEY])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), used + (3 << 29)))
    chance, end = random.Random(seed), time.process_time() + seconds
    refused = ran = 0
    while time.process_time() < end:
        with open(f"{path}.forged", "wb") as file:
            file.write(written(state, mutated(said, chance)))
        try:
            loaded = mm.runtime.load(f"{path}.forged", tune=False, threads=1)
        except mm.FormatError:
            refused += 1
            continue
        given = [np.zeros(port.example, np.float32) for port in loaded.inputs if np.prod(port.example) < 1e6]
        try:
            loaded(*given)
        except (ValueError, TypeError, MemoryError):
            refused += 1
            continue
        ran += 1
    print(refused, ran)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))

"""Writes tests/methods/options.json: what a method reads and what it makes of it.

Run as ``python tests/methods/frozen_options.py``, for the row of a new method. The other rows are of the version before
options were listed once: a change to one is a change for users.
"""

import inspect
import json
from pathlib import Path

import mirrormask as mm
from mirrormask.methods.description import describe, differences

PATH = Path(__file__).parent / "options.json"
#: For every option a value that is nobody's default.
OTHER = {
    "K": 0.3,
    "a": 1.0,
    "allocation": "uniform",
    "alpha": 0.125,
    "alpha_init": 1e-3,
    "at": 0.25,
    "b": 0.5,
    "beta": 1.5,
    "clip": 0.2,
    "coupled": True,
    "decay_from": 0.1,
    "decay_limit": 1e-3,
    "decay_until": 0.6,
    "delta": 1.2,
    "depth": 4,
    "end_at": 0.7,
    "every": 0.05,
    "factors": False,
    "final": 100.0,
    "floor": 0.2,
    "fraction": 0.2,
    "gain": 0.9,
    "growth": 0.8,
    "half": 0.4,
    "init_threshold": 0.02,
    "least": 0.5,
    "pattern": "2:4",
    "penalty": 1e-6,
    "phase": 0.03,
    "power": 3.0,
    "prunings": 3,
    "relative": False,
    "rewind_to": 0.2,
    "s_init": 0.5,
    "strength": 0.125,
    "score": "lamp",
    "seed": 3,
    "shrink": 3.0,
    "spread": 0.3,
    "start_at": 0.05,
    "until": 0.6,
}


def options(name):
    """Option -> how it is passed, its type and its default."""
    return {
        option: [p.kind.name, p.annotation, "required" if p.default is p.empty else p.default]
        for option, p in inspect.signature(mm.methods.get(name)).parameters.items()
    }


def reached(name, option):
    """What another value of one option changes; the text of the error where it is refused."""
    method = mm.methods.get(name)
    try:
        return differences(describe(method(0.5)), method(0.5, **{option: OTHER[option]}))
    except ValueError as error:
        return [str(error)]


def table():
    """All of it, a method a row."""
    return {
        name: {
            "options": options(name),
            "method": repr(mm.methods.get(name)(0.0 if name == "dense" else 0.9)),
            "reached": {option: reached(name, option) for option in options(name) if option != "sparsity"},
        }
        for name in mm.methods.names()
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(table(), indent=1, ensure_ascii=False) + "\n")

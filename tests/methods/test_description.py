"""A method as plain values: what JSON keeps, what an old repr tells, and what differs."""

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import mirrormask as mm
from mirrormask.corrections import Correction, Hyperbolic, Proximal
from mirrormask.decay import ConstantDecay, PILoTDecay, ShrinkDecay
from mirrormask.geometry import Euclidean, Hadamard
from mirrormask.masks import Gradual, OneShot
from mirrormask.methods.description import describe, differences, parse_repr

FROZEN = sorted((Path(__file__).parent.parent / "optimizer" / "data").glob("0.1.0-*.pt"))


def method(name):
    return mm.methods.get(name)(0.0 if name == "dense" else 0.9)


@dataclass(frozen=True)
class Noisy(Correction):
    """A user's own part, with values of every kind."""

    inner: tuple = (Hyperbolic(), Proximal())
    bound: float = math.inf
    flags: dict = field(default_factory=lambda: {"a": 1})
    hidden: int = field(default=0, repr=False)

    def apply(self, theta, prepared, lr):
        pass


class Plain(Euclidean):
    """A user's own part that only its repr tells of."""

    def __init__(self, k):
        object.__setattr__(self, "k", k)

    def __repr__(self):
        return f"Plain({self.k!r})"


class Keyed(Plain):
    def __repr__(self):
        return f"Keyed(k={self.k!r})"


class Silent(Gradual):
    """One that extends a dataclass and says nothing more."""


OWN = mm.Method(Hadamard(1.0), ConstantDecay(1e-05, coupled=True), OneShot(0.5), "own", Noisy())
PLAIN = mm.Method(Plain("3"), ConstantDecay(), Silent(0.5))
EVERY = [*(method(name) for name in mm.methods.names()), OWN, PLAIN, mm.Method(Keyed(1), ConstantDecay(), OneShot())]


def test_a_description_that_an_eye_can_check():
    own = mm.Method(Hadamard(), ShrinkDecay(limit=0.004), OneShot(0.95, pattern=None), "mine", Hyperbolic(clip=None))
    assert describe(own) == {
        "type": "Method",
        "geometry": {"type": "Hadamard", "beta": "rms", "gain": "auto"},
        "decay": {
            "type": "ShrinkDecay",
            "coupled": False,
            "shrink": 4.0,
            "start_at": 0.05,
            "end_at": 0.75,
            "limit": 0.004,
            "growth": None,
        },
        "mask": {
            "type": "OneShot",
            "sparsity": 0.95,
            "score": "magnitude",
            "allocation": "global",
            "pattern": None,
            "seed": 0,
            "floor": mm.masks.FLOOR,
            "at": 0.5,
        },
        "name": "mine",
        "correction": {"type": "Hyperbolic", "a": 20.0, "b": 0.001, "clip": None},
        "adaptive": None,
    }
    assert describe(OWN)["correction"] == {
        "type": "Noisy",
        "inner": [
            {"type": "Hyperbolic", "a": 20.0, "b": 0.001, "clip": 0.1},
            {"type": "Proximal", "alpha": 0.0001, "until": 1.0},
        ],
        "bound": "inf",
        "flags": "{'a': 1}",
    }
    assert describe(PLAIN)["geometry"] == "Plain('3')"
    assert describe(PLAIN)["mask"]["type"] == "Silent"


@pytest.mark.parametrize("own", EVERY, ids=lambda own: own.name)
def test_a_method_is_the_same_through_json(own):
    saved = json.loads(json.dumps(describe(own), allow_nan=False))
    assert saved == describe(own)
    assert differences(saved, own) == []


@pytest.mark.parametrize("own", EVERY[:-1], ids=lambda own: own.name)
def test_a_repr_tells_as_much(own):
    assert parse_repr(repr(own)) == describe(own)
    assert parse_repr(repr(own).replace("correction=", "after=")) == describe(own)


@pytest.mark.parametrize("own", EVERY, ids=lambda own: own.name)
def test_a_repr_has_no_differences(own):
    assert differences(parse_repr(repr(own).replace("correction=", "after=")), own) == []


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_the_methods_of_old_checkpoints_are_those_of_today(path):
    saved = torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]["mirrormask"]
    _, name, base = path.stem.split("-")
    options = {"lth": {"prunings": 2}, "mirror": {"growth": None}}.get(name, {})  # mirror has other defaults since
    own = mm.methods.get(name)(0.75, **options).under(adaptive=base == "adamw")
    assert differences(parse_repr(json.loads(saved)["method"]), own) == []


def test_there_are_old_checkpoints():
    assert len(FROZEN) >= 10


@pytest.mark.parametrize("value", [0.1, 1 / 45, 1e-05, 5e-324, 1.7976931348623157e308, 123456789.123456789])
def test_floats_are_exact(value):
    own = mm.Method(Hadamard(), ConstantDecay(value), OneShot())
    for saved in (json.loads(json.dumps(describe(own))), parse_repr(repr(own))):
        assert saved["decay"]["alpha"] == value
        other = mm.Method(Hadamard(), ConstantDecay(math.nextafter(value, 0)), OneShot())
        assert [line.split(":")[0] for line in differences(saved, other)] == ["decay.alpha"]


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")])
def test_numbers_that_json_lacks_are_words(value, text):
    own = dataclasses.replace(OWN, correction=Noisy(bound=value))
    assert describe(own)["correction"]["bound"] == text
    assert parse_repr(repr(own)) == describe(own)
    assert differences(describe(own), own) == []


def test_numpy_numbers_are_numbers():
    own, plain = (mm.methods.gmp(s, allocation=a) for s, a in ((np.float64(0.9), np.str_("erk")), (0.9, "erk")))
    assert json.dumps(describe(own)) == json.dumps(describe(plain))
    assert parse_repr(repr(own)) == describe(plain)


def without(saved, part, option):
    return {**saved, part: {key: value for key, value in saved[part].items() if key != option}}


GMP = describe(mm.methods.gmp(0.9))


@pytest.mark.parametrize(
    ("saved", "own", "lines"),
    [
        (GMP, mm.methods.gmp(0.5), ["mask.sparsity: 0.9 there, 0.5 here"]),
        (
            GMP,
            mm.methods.gmp(0.9, every=0.1, pattern=None, allocation="erk"),
            ["mask.allocation: 'global' there, 'erk' here", "mask.every: 0.022222222222222223 there, 0.1 here"],
        ),
        (without(GMP, "mask", "every"), mm.methods.gmp(0.9), []),
        (without(GMP, "mask", "every"), mm.methods.gmp(0.9, every=0.1), ["mask.every: 0.0222"]),
        (without(GMP, "decay", "coupled"), mm.methods.gmp(0.9), []),
        ({**GMP, "mask": {**GMP["mask"], "old": 1}}, mm.methods.gmp(0.9), ["mask.old: 1 there, unknown here"]),
        ({k: v for k, v in GMP.items() if k != "adaptive"}, mm.methods.gmp(0.9), []),
        ({k: v for k, v in GMP.items() if k != "mask"}, mm.methods.gmp(0.9), ["mask: not there, Gradual(sparsity=0.9"]),
        (
            GMP,
            mm.methods.gmp_ham(0.9),
            [
                "name: 'gmp' there, 'gmp_ham' here",
                "correction: None there, Hyperbolic(a=20.0, b=0.001, clip=0.1) here",
            ],
        ),
        (
            GMP,
            dataclasses.replace(mm.methods.pilot(0.9), name="gmp"),
            [
                "geometry: Euclidean there, Hadamard here",
                "decay: ConstantDecay there, PILoTDecay here",
                "mask: Gradual there, OneShot here",
            ],
        ),
        (
            describe(mm.methods.mirror(0.9)),
            mm.methods.mirror(0.9, score="lamp"),
            ["mask.score: 'magnitude' there, 'lamp' here", "adaptive.mask.score: 'balanced' there, 'lamp' here"],
        ),
        (
            describe(OWN),
            dataclasses.replace(OWN, correction=Noisy(inner=(Hyperbolic(a=1.0), Proximal()), flags={})),
            ["correction.inner[0].a: 20.0 there, 1.0 here", "correction.flags: \"{'a': 1}\" there, '{}' here"],
        ),
        (
            describe(OWN),
            dataclasses.replace(OWN, correction=Noisy(inner=())),
            ["correction.inner: [Hyperbolic("],
        ),
        (without(describe(OWN), "correction", "flags"), OWN, []),
        (
            describe(PLAIN),
            dataclasses.replace(PLAIN, geometry=Plain(4)),
            ["geometry: \"Plain('3')\" there, 'Plain(4)'"],
        ),
        (
            parse_repr(repr(EVERY[-1])),
            dataclasses.replace(EVERY[-1], geometry=Keyed(2)),
            ["geometry: Keyed(k=1) there, Keyed(k=2) here"],
        ),
        ({"type": "Recipe"}, mm.methods.gmp(0.9), ["the method: Recipe there, Method here"]),
        ({}, mm.methods.gmp(0.9), ["the method: {} there, Method("]),
        (describe(mm.methods.gmp(0.9)) | {"name": 1.0}, mm.methods.gmp(0.9), ["name: 1.0 there, 'gmp' here"]),
    ],
)
def test_differences_that_an_eye_can_check(saved, own, lines):
    found = differences(saved, own)
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True)), found


def test_a_class_that_has_become_a_dataclass_is_still_known():
    saved = describe(OWN) | {"correction": "Noisy(inner=(), bound=2.0, flags={})"}
    assert differences(saved, dataclasses.replace(OWN, correction=Noisy((), 2.0, {}))) == []
    assert differences(saved, dataclasses.replace(OWN, correction=Noisy((), 3.0, {}))) == [
        "correction.bound: 2.0 there, 3.0 here"
    ]


PARTS = "geometry=Euclidean(), decay=ConstantDecay(coupled=False, alpha={}), mask=OneShot(sparsity=0.5)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Method(",
        "0.5",
        "'Method'",
        "gmp(0.9)",
        "\0",
        "(" * 500,
        "-" * 20_000 + "1",
        f"Method({PARTS.format('1 + 1')})",
        f"Method({PARTS.format('print')})",
        f"Method({PARTS.format('[i for i in (1,)]')})",
        f"Method({PARTS.format('(lambda: 1)()')})",
        f"Method({PARTS.format('f(1, print)')})",
        f"Method({PARTS.format('f(*(1,))')})",
        f"Method({PARTS.format('f(**{})')})",
        f"Method({PARTS.format('<function f at 0x7f0000000000>')})",
        f"Method(geometry=test.<locals>.Mine(), {PARTS.format('1')})",
        "__import__('os').system(command='true')(x=1)",
    ],
)
def test_what_is_no_calls_and_literals_is_refused_with_a_remedy(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of a literal that is called
        with pytest.raises(ValueError, match=r"cannot read the method .*; go on with the version of mirrormask that"):
            parse_repr(text)


def test_reading_runs_nothing(tmp_path):
    target = tmp_path / "run"
    parse_repr(f"Method(geometry=open(file={str(target)!r}, mode='w'), mask=open({str(target)!r}, 'w'))")
    assert not target.exists()


def test_a_repr_of_old_that_an_eye_can_check():
    text = (
        "Method(geometry=Hadamard(beta='rms', gain='auto'), decay=PILoTDecay(alpha_init=1e-05, delta=1.1, K=inf), "
        "mask=OneShot(sparsity=0.5, at=1), name='custom', after=Proximal(alpha=0.1), adaptive=None)"
    )
    assert parse_repr(text)["decay"] == {"type": "PILoTDecay", "alpha_init": 1e-05, "delta": 1.1, "K": "inf"}
    assert parse_repr(text)["correction"] == {"type": "Proximal", "alpha": 0.1}
    own = mm.Method(Hadamard(), PILoTDecay(1e-5, K=0.1), OneShot(0.5, at=1.0), correction=Proximal(0.1))
    assert differences(parse_repr(text), own) == ["decay.K: 'inf' there, 0.1 here"]

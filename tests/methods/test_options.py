"""What each method reads is what it read before options were listed once, and what users see of it is all of it."""

import inspect
import json

import frozen_options as frozen
import pytest

import mirrormask as mm

TABLE = json.loads(frozen.PATH.read_text())


def test_every_method_is_in_the_table():
    assert sorted(TABLE) == sorted(mm.methods.names())


@pytest.mark.parametrize("name", TABLE)
def test_its_options_and_what_becomes_of_them_are_as_they_were(name):
    row = TABLE[name]
    assert frozen.options(name) == row["options"]
    assert repr(mm.methods.get(name)(0.0 if name == "dense" else 0.9)) == row["method"]
    for option, changes in row["reached"].items():
        assert changes, f"{option} changes nothing"
        assert frozen.reached(name, option) == changes


@pytest.mark.parametrize("name", TABLE)
def test_every_option_is_documented_in_the_order_of_the_signature(name):
    method = mm.methods.get(name)
    options = list(inspect.signature(method).parameters)
    assert options[0] == "sparsity"
    if name != "dense":
        doc = inspect.getdoc(method)
        lines = doc.partition("\n\nArgs:\n")[2].partition("\n\n")[0].splitlines()
        told = [o for line in lines if line[:5].strip() for o in line.partition(":")[0].replace(" ", "").split(",")]
        assert told == options
        assert doc.count("\nArgs:\n") == 1


@pytest.mark.parametrize("name", TABLE)
def test_a_call_that_does_not_fit_names_the_method(name):
    method, own = mm.methods.get(name), mm.methods.get(name).__name__
    options = ", ".join(inspect.signature(method).parameters)
    with pytest.raises(TypeError, match=rf"the method '{name}' does not read nonsense; its options: {options}$"):
        method(0.5, nonsense=1)
    with pytest.raises(TypeError, match=rf"{own}\(\).*positional argument"):
        method(0.5, 0.5)
    if name != "dense":
        with pytest.raises(TypeError, match=rf"{own}\(\).*missing .*'sparsity'"):
            method()

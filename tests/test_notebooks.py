"""The notebooks run from top to bottom; their own assertions say what they promise."""

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


#: Trains a network and tunes its layers, which takes half a minute.
LONG = {"ten_minutes"}
CASES = [pytest.param(path, marks=[pytest.mark.long] * (path.stem in LONG), id=path.stem) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", CASES)
def test_a_notebook_runs(path, capsys):
    runpy.run_path(str(path))
    assert capsys.readouterr().out

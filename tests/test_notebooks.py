"""The notebooks run from top to bottom; their own assertions say what they promise."""

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path, capsys):
    runpy.run_path(str(path))
    assert capsys.readouterr().out

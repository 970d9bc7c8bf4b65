"""What the documentation shows is run: docstrings' examples, and the Python blocks of the README and of some pages."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mirrormask

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(mirrormask.__path__, "mirrormask.") if "__main__" not in m.name)
BLOCKS = [
    (f"{page} block {number}", block)
    for page in ("README.md", "docs/tools.md", "docs/compile.md", "docs/finetune.md", "docs/prune.md", "docs/deploy.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_block(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from transformers" in block:
        pytest.importorskip("transformers")
    exec(compile(block, name, "exec"), {"__name__": "readme"})


def test_the_readme_has_blocks_and_its_links_exist():
    assert BLOCKS
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_every_public_name_is_there_and_documented():
    for name in dir(mirrormask):
        value = getattr(mirrormask, name)
        assert name.startswith("__") or value.__doc__, name

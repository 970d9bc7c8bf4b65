"""Dependencies within optimizer/ point one way: no file imports one above it, not even for its types."""

import ast
from pathlib import Path

import mirrormask

FOLDER = Path(mirrormask.__path__[0]) / "optimizer"
#: From the ground up; files of one row know nothing of each other, but for the folder of steps.
HOUSE = [
    {"processes", "dtensors", "base_groups", "surroundings"},
    {"shards", "agreement", "base_trials"},
    {"weights", "scores", "saved_state", "saved_numbers"},
    {"base_optimizer", "decay_clock", "edits", "presence", "freezing", "mistaken"},
    {"mask_choice"},
    {"steps", "mask_changes", "rounds", "diagnostics", "arguments"},
    {"training"},
    {"parts", "state_dict"},
    {"due", "outcome", "together", "narrow_state"},
    {"sparse_optimizer"},
    {"unheard", "zeros"},
    {"sparsify"},
]
FLOOR = {name: floor for floor, row in enumerate(HOUSE) for name in row}


def imported(path):
    """What a file imports of optimizer/, type-checking blocks and functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("mirrormask.optimizer."):
                yield name.split(".")[2]


def test_every_file_has_its_floor_and_looks_down_only():
    files = [path for path in FOLDER.rglob("*.py") if path.parent != FOLDER or path.name != "__init__.py"]
    assert {path.relative_to(FOLDER).parts[0].removesuffix(".py") for path in files} == set(FLOOR)
    for path in files:
        own = path.relative_to(FOLDER).parts[0].removesuffix(".py")
        for name in imported(path):
            below = FLOOR[name] < FLOOR[own] or name == own == "steps"
            assert below, f"{path.relative_to(FOLDER)} imports {name}, which is not below it"


def test_the_parts_of_a_method_know_nothing_of_each_other_or_of_the_optimizer():
    parts = ("geometry", "decay", "masks", "corrections")
    for part in parts:
        for path in (FOLDER.parent / part).rglob("*.py"):
            text = path.read_text()
            for other in (*parts, "methods", "optimizer"):
                assert other == part or f"mirrormask.{other}" not in text.split('"""', 2)[2], f"{path} knows {other}"

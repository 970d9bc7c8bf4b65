"""The rooms of the runtime: which may look into which, and which know PyTorch."""

import ast
from pathlib import Path

import mirrormask

FOLDER = Path(mirrormask.__path__[0]) / "runtime"
#: What each folder may import of the runtime, besides itself.
BELOW = {
    "graph": set(),
    "kernels": set(),
    "schedule": {"graph", "kernels"},
    "bundle": {"graph", "schedule"},
    "model": {"graph", "schedule", "kernels", "bundle"},
    "build": {"graph", "schedule", "model"},
    "engines": {"build"},
    "benchmark": {"build", "engines"},
}
#: A file for each step of a plan has to name the graph's activation chains, layouts and kernels: no folder but these.
TORCHLESS = ("schedule", "kernels", "bundle")
#: Files of graph/ that are the graph itself, rather than how a model is read.
PLAIN = {"ir", "guards", "blueprint", "known", "levels", "sound", "__init__"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms():
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).parts
        if parts != ("__init__.py",):
            yield path, parts[0].removesuffix(".py")


def test_every_room_looks_down_only():
    assert {room for _, room in rooms()} == set(BELOW)
    for path, room in rooms():
        seen = {name.split(".")[2] for name in imports(path) if name.startswith("mirrormask.runtime.")}
        assert seen <= BELOW[room] | {room}, f"{path.relative_to(FOLDER)} looks into {seen - BELOW[room] - {room}}"


def test_plans_kernels_and_the_graph_itself_know_no_torch():
    machine = sorted((FOLDER.parent / "machine").rglob("*.py"))
    plain = [path for path, room in rooms() if room in TORCHLESS or (room == "graph" and path.stem in PLAIN)]
    for path in [*machine, *plain]:
        used = {name for name in imports(path) if name.partition(".")[0] == "torch"}
        assert not used, f"{path.name} imports {used}"


def test_a_kernel_is_known_in_its_own_file_alone():
    kinds = set()
    for path in (FOLDER / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Kernel":
                kinds.add(node.args[0].value)
    assert {"sparse", "dense", "winograd", "relayout", "pool"} <= kinds
    for path, room in rooms():
        if room != "kernels":
            text = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            # A choice of a layer's kernel is made in schedule/, where its name is that of the choice.
            named = {kind for kind in kinds & text if room != "schedule" and "_" in kind}
            assert not named, f"{path.relative_to(FOLDER)} names the kernels {named}"

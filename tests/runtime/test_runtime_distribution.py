"""The second distribution, ``mirrormask-runtime``: its files are enough to run a model, and none wants torch."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "packaging" / "runtime"


def settings(path):
    return tomllib.loads((path / "pyproject.toml").read_text())


def files():
    """Path in the distribution -> its source."""
    found = {}
    listed = settings(FOLDER)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in listed.items():
        path = (FOLDER / source).resolve()
        assert path.exists(), f"{source} is listed and not there"
        inner = [p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc"] if path.is_dir() else [path]
        found |= {(Path(target) / p.relative_to(path)) if path.is_dir() else Path(target): p for p in inner}
    return found


def test_it_says_what_the_whole_package_says():
    whole, part = settings(ROOT)["project"], settings(FOLDER)["project"]
    assert all(whole[key] == part[key] for key in ("dynamic", "license", "requires-python"))
    for path in (ROOT, FOLDER):  # both versions are the package's own
        said = settings(path)["tool"]["hatch"]["version"]["path"]
        assert (path / said).resolve() == ROOT / "src" / "mirrormask" / "__init__.py"
    assert f"\nversion: {mm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{mm.__version__}]\n" in (ROOT / "CHANGELOG.md").read_text()
    wanted = {*whole["dependencies"], *whole["optional-dependencies"]["runtime"]}
    extra = [name for name in whole["optional-dependencies"]["serve"] if not name.startswith("mirrormask")]
    assert part["optional-dependencies"]["serve"] == extra and part["scripts"] == whole["scripts"]
    assert set(part["dependencies"]) == {name for name in wanted if name.startswith(("numpy", "llvmlite"))}


def test_none_of_its_files_wants_torch_or_a_file_that_is_missing():
    included = {path.with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".") for path in files()}
    for path, source in files().items():
        if source.suffix != ".py":
            continue
        tree = ast.parse(source.read_text())
        apart = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        skipped = {id(inner) for node in apart for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
                assert node.module.partition(".")[0] not in ("torch", "safetensors"), path
                if node.module.startswith("mirrormask."):
                    assert node.module in included, f"{path} imports {node.module}"


def test_its_files_alone_run_a_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    fast = mm.compile(model, torch.randn(2, 3, 10, 10), tune=False, force=True)
    fast.save(tmp_path / "m.mirror")
    x = torch.randn(3, 3, 10, 10)
    np.savez(tmp_path / "case.npz", x=x.numpy(), wanted=fast(x).numpy())
    for path, source in files().items():
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tmp_path / "site" / path)
    (tmp_path / "site" / "torch.py").write_text("raise ImportError('there is no torch here')")
    script = """
        import sys
        import numpy as np
        import mirrormask.runtime
        assert mirrormask.__file__.startswith(sys.argv[1]), mirrormask.__file__
        case = np.load(f"{sys.argv[1]}/case.npz")
        model = mirrormask.runtime.load(f"{sys.argv[1]}/m.mirror", threads=1)
        assert np.array_equal(model(case["x"]), case["wanted"])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

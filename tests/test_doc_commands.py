"""What the README and the docs say to type is understood: options, names and files of every ``mirrormask`` line."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mirrormask.cli import main

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LINES = sorted(
    {
        re.sub(r"\s+#.*", "", line.strip())
        for page in PAGES
        for line in re.findall(r"^    mirrormask .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if "..." not in line
    }
)
TRAINED = [line for line in LINES if line.split()[1] in ("train", "compare")]
ON_A_RUN = [line for line in LINES if re.match(r"mirrormask (info|export|bench|report) runs/", line)]


@pytest.mark.cases(len(LINES))
@pytest.mark.parametrize("line", TRAINED)
def test_a_training_s_options_are_understood(line, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line)[1:], "--print_config"])
    assert stop.value.code in (0, None)
    assert "epochs:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where ``make demo`` and a comparison have left small runs."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--method", "mirror", "--epochs", "1", "--out", "runs/demo", "--figure", "false"]) == 0
    shutil.copytree(folder / "runs/demo", folder / "runs/compare-digits-mlp")
    return folder


@pytest.mark.parametrize("line", [line for line in ON_A_RUN if " bench " not in line])
def test_a_command_about_a_run_does_what_it_says(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.long
@pytest.mark.parametrize("line", [line for line in ON_A_RUN if " bench " in line])
def test_a_run_s_speed_is_measured(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(shlex.split(line)[1:]) == 0
    assert "mirrormask" in capsys.readouterr().out


def test_every_line_is_tried():
    assert len(TRAINED) >= 10
    assert len(ON_A_RUN) >= 4

"""The page: material and templates to one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from mirrormask import __version__, checks, files
from mirrormask.report import words
from mirrormask.report.blob import script_json
from mirrormask.report.material import Material, gather

__all__ = ["Written", "render", "report", "write"]

#: The page's own scripts, in the order in which they depend on each other.
SCRIPTS = (
    "core.js",
    "tables.js",
    "look.js",
    "charts.js",
    "accuracy.js",
    "tradeoffs.js",
    "pairs.js",
    "training.js",
    "layers.js",
    "times.js",
    "weights.js",
    "run.js",
    "records.js",
    "start.js",
)


@dataclass(frozen=True)
class Written:
    """A page that was written: where, about how many runs, what was passed over, and its size in bytes."""

    path: Path
    runs: int
    skipped: int
    size: int

    def __str__(self) -> str:
        passed = f", {words.count(self.skipped, 'other thing')} passed over and named in it" if self.skipped else ""
        return f"{self.path}: {words.count(self.runs, 'run')}{passed}; {words.size(self.size)}"


def write(folders: str | Path | Sequence[str | Path], out: str | Path = "report.html", *, title: str = "") -> Path:
    """Write one self-contained HTML page about every finished run at or below ``folders``.

    The file is written whole or not at all. What is damaged, unfinished or foreign is skipped, and named in the page.

    Args:
        folders: run folders, or folders that hold some at any depth. The dense runs that ``mirrormask train`` left
            beside them are shown too.
        out: the file; replaced if it is there.
        title: of the page; by default what was trained on what.

    Returns:
        The file's path.

    Raises:
        ImportError: plotly is not installed.
        ValueError: there is no finished run, or ``out`` cannot be written.

    Example:
        >>> write("nowhere")
        Traceback (most recent call last):
        ValueError: there is no finished run to report on; train one first
          nowhere: does not exist
    """
    return report([folders] if isinstance(folders, (str, Path)) else folders, out, title=title).path


def report(folders: Sequence[str | Path], out: str | Path, *, title: str = "") -> Written:
    """As :func:`write`, with the numbers of what was written."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the page a name, as in {str(path / 'report.html')!r}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} of {str(path)!r} does not exist; make it, or choose another")
    material = gather(folders)
    text = render(material, title=title)
    try:
        files.write_text(path, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write {str(path)!r}: {reason}; choose another --out, or make room") from error
    return Written(path, material.runs, len(material.skipped), len(text.encode()))


def render(material: Material, *, title: str = "") -> str:
    """The whole page as text."""
    setting = material.tree["settings"][0]
    scripts = {"theme": asset("theme.js"), "plotly": _plotly(), "app": _app()}
    single = sum("dense" not in r or r["dense"] != i for i, r in enumerate(material.tree["runs"])) == 1
    data = {**material.tree, "single": single, "version": __version__}
    values = {
        "title": title or setting["title"],
        "detail": setting["detail"],
        "finding": setting["findings"]["accuracy"],
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "runs": words.count(material.runs, "run"),
        "skipped": str(len(material.skipped)),
        **{f"finding_{name}": text for name, text in setting["findings"].items()},
    }
    escaped = {name: html.escape(_printable(value)) for name, value in values.items()}
    policy = " ".join(f"'sha256-{_digest(text)}'" for text in scripts.values())
    template = string.Template(asset("page.html"))
    return template.substitute(
        escaped, **scripts, policy=policy, style=asset("style.css"), data=script_json(data), single=str(single).lower()
    )


def asset(name: str) -> str:
    """A file of ``assets/``, as text."""
    return resources.files("mirrormask.report").joinpath("assets", name).read_text("utf-8")


def _app() -> str:
    """The page's scripts as one function, so that nothing in them is global."""
    return "(() => {\n'use strict';\n" + "\n".join(asset(name) for name in SCRIPTS) + "\n})();"


def _plotly() -> str:
    offline = checks.require("plotly.offline", "train", "mirrormask report")
    # Only a line feed is left as it is by every HTML parser, and the policy's hash must agree with what it leaves.
    return str(offline.get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _printable(text: str) -> str:
    """Text that UTF-8 can hold: a file's name may carry bytes that are not text."""
    return text.encode("utf-8", "replace").decode("utf-8")

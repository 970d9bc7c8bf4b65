"""A hook of MkDocs: the pages that are made from the source.

One for each method, of its docstring, its parts and its rows of docs/results.md; one for each file of ``examples/`` and
``notebooks/``.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe
import jupytext
from docstrings import rewritten
from mkdocs.structure.files import File

import mirrormask as mm

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def on_config(config: Any) -> Any:
    """Put the methods' pages behind the page of all methods."""
    section = next(entry for entry in config.nav if "Methods" in entry)
    section["Methods"] += [f"methods/{name}.md" for name in mm.methods.names()]
    start = next(entry for entry in config.nav if "Start" in entry)
    start["Start"] += [f"notebooks/{path.stem}.md" for path in reversed(NOTEBOOKS)]
    guides = next(entry for entry in config.nav if "Guides" in entry)
    guides["Guides"].append({"Examples": [f"examples/{path.stem}.md" for path in EXAMPLES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add ``methods/NAME.md`` for every named method and ``examples/NAME.md`` for every example."""
    for name in mm.methods.names():
        files.append(File.generated(config, f"methods/{name}.md", content=page(name)))
    for path in EXAMPLES:
        code = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=code))
    for path in NOTEBOOKS:
        text = jupytext.writes(jupytext.read(path), fmt="md").split("---\n", 2)[-1].replace("](../docs/", "](../")
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to an example's file, which a clone has, go to its page, and the methods of the table to theirs."""
    if page.file.src_uri == "methods.md":
        names = "|".join(mm.methods.names())
        markdown = re.sub(rf"^\| `({names})` \|", r"| [`\1`](methods/\1.md) |", markdown, flags=re.MULTILINE)
    return re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples/\1.md)", markdown)


def page(name: str) -> str:
    """The page of one method, as Markdown."""
    row = next(row for row in mm.methods.table() if row.name == name)
    function = getattr(mm.methods, name)
    first, *others = griffe.Docstring(rewritten(inspect.getdoc(function) or "")).parse("google", warnings=False)
    line, _, rest = str(first.value).partition("\n")
    parts = [f"# {name}", "", line, "", "```python", _signature(function), "```", "", rest.strip(), ""]
    for section in others:
        parts += [*_section(section), ""]
    parts += [f"Reference: {row.reference}", ""]
    if rows := result_rows(name, RESULTS.read_text(encoding="utf-8")):
        parts += ["## What it reached", "", *rows, "All rows, budgets and commands: [Results](../results.md).", ""]
    parts += ["## Its parts", "", "```python", f">>> mm.methods.{name}(0.9)", _parts(example(function)), "```", ""]
    return "\n".join(parts)


def _signature(function: Any) -> str:
    """The call, an option a line, without types."""
    options = [
        f"    {option.name}" + ("" if option.default is option.empty else f"={_short(option.default)}") + ","
        for option in inspect.signature(function).parameters.values()
    ]
    return "\n".join([f"mm.methods.{function.__name__}(", *options, ")"])


def _short(value: Any) -> str:
    """A default as one would write it: a share of training to three digits."""
    return f"{value:.3g}" if isinstance(value, float) and len(repr(value)) > 8 else repr(value)


def _section(section: Any) -> list[str]:
    """A section of a docstring."""
    if section.kind.value == "parameters":
        return ["## Options", "", *_options(section.value)]
    if section.kind.value == "raises":
        return ["**Raises:**", "", *(f"- `{one.annotation}`: {_flowing(one.description)}" for one in section.value)]
    if section.kind.value == "examples":
        return ["**Example:**", "", "```pycon", *(text for _, text in section.value), "```"]
    if section.kind.value == "text":
        return [str(section.value)]
    title = section.title or section.kind.value.title()
    return [f"**{title}:** {_flowing(getattr(section.value, 'contents', section.value))}"]


def _options(parameters: Any) -> list[str]:
    """A line an option; those that are explained together are in one."""
    lines, waiting = [], []
    for one in parameters:
        waiting.append(f"**`{one.name}`**")
        text = _flowing(one.description)
        if not re.fullmatch(r"with `\w+`, below\.", text):
            lines.append(f"- {', '.join(waiting)}: {text}")
            waiting = []
    return lines


def _flowing(text: Any) -> str:
    """One line, in which a page of the docs is a link."""
    return re.sub(
        r"docs/(\w+)\.md", lambda one: f"[{one[1].capitalize()}](../{one[0][5:]})", " ".join(str(text).split())
    )


def _parts(method: Any) -> str:
    """The method's repr, a part a line."""
    return re.sub(r", (?=\w+=[A-Z]\w*\()", ",\n       ", repr(method))


def example(function: Any) -> Any:
    """The method at a sparsity that it takes, for its parts."""
    takes = inspect.signature(function).parameters
    return function(0.9) if "sparsity" in takes and function.__name__ != "dense" else function()


def result_rows(name: str, text: str) -> list[str]:
    """The rows of ``name`` in tables of several sparsities, each under its header and experiment."""
    found: list[str] = []
    title, header = "", ""
    for line in text.splitlines():
        if line.startswith("## "):
            title, header = line[3:], ""
        elif re.match(r"\| [^|]*test accuracy[^|]*\|.*% \|", line):
            header = line
        elif not line.startswith("|"):
            header = ""
        elif header and re.match(rf"\| `?{re.escape(name)}`? \|", line):
            found += [f"{title}:", "", header, "|" + "---|" * (header.count("|") - 1), line, ""]
    return found

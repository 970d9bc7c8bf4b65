"""A Griffe extension: what the docstrings say in the source's own way, in MkDocs' way.

``Example:`` becomes the section of examples; a line of arguments that are explained together, ``a, b: ...``, one line
for each; the roles of reStructuredText (``:class:`x```) links.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: The name after a role; with ``~`` only its last part would show.
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
#: An entry of a section of arguments that explains several names together.
TOGETHER = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that was collected."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """The docstring as MkDocs reads it."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = line in ("Args:", "Attributes:")
        if inside and (found := TOGETHER.match(line)):
            indent, names, rest = found.groups()
            *others, last = names.split(", ")
            lines += [f"{indent}{name}: with `{last}`, below." for name in others]
            lines.append(f"{indent}{last}: {rest}")
        else:
            lines.append("Examples:" if line == "Example:" else line)
    return ROLE.sub(lambda role: _link(role[1]), "\n".join(lines))


def _link(name: str) -> str:
    """Code, and a link where the name has a place on a page."""
    last = name.rsplit(".", 1)[-1]
    return f'<autoref identifier="{name}" optional><code>{last}</code></autoref>' if "." in name else f"`{last}`"

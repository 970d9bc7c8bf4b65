"""One self-contained HTML page about many runs, or about one: ``mirrormask report runs/...``.

The charts are drawn by Plotly: its Python package carries the whole library as one file, which goes into the page once,
and its bars, error bars, log axes, hovering and zooming work without a network. Vega-Altair would need a second
package with a JavaScript engine inside to write a page that opens offline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.report.page import write

__all__ = ["write"]

__getattr__ = lazily(
    __name__,
    {
        "write": "mirrormask.report.page",
    },
)

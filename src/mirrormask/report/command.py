"""``mirrormask report``: folders of runs to one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from mirrormask import checks, outcome, waiting

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask report`` with these arguments; the exit status.

    Raises:
        ValueError: no finished run is there, or the page cannot be written where it was asked for.
    """
    parser = checks.Parser(
        prog="mirrormask report",
        description="Write one self-contained HTML page about finished runs: charts, tables, how to reproduce them.",
        epilog="Example: mirrormask report runs/demo --out demo.html",
    )
    parser.add_argument("folders", nargs="+", help="run folders, or folders that hold some at any depth")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html, replaced if it is there)")
    parser.add_argument("--title", default="", help="the page's title; by default what was trained on what")
    values = parser.parse_args(checks.known_options(arguments, parser._option_string_actions))

    from mirrormask.report.page import report

    with waiting.stages("report") as at:
        at("reading runs and writing the page")
        written = report(values.folders, values.out, title=values.title)
    print(written)
    outcome.tell({"page": written.path, "runs": written.runs, "skipped": written.skipped, "bytes": written.size})
    return 0

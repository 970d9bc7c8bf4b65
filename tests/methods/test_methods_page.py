"""docs/methods.md says the same as the code."""

from pathlib import Path

import mirrormask as mm

PAGE = (Path(__file__).parent.parent.parent / "docs" / "methods.md").read_text()


def test_the_page_has_the_table_of_the_code():
    rows = [f"| `{row.name}` | {row.line} | {row.reference} |" for row in mm.methods.table()]
    missing = [row for row in rows if row not in PAGE]
    assert not missing, "docs/methods.md lacks:\n" + "\n".join(missing)
    table = PAGE[PAGE.index("## All of them") :].split("\n## ")[0]
    assert table.count("\n| `") == len(rows)

"""``upscale coverage``: the tables of ``upscale zoo`` as one document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..zoo.markdown import write_markdown
from ..zoo.rows import BadTableError, Row, merged, read_rows
from ..zoo.show import summary
from .errors import UsageError

Tables = Annotated[list[Path], typer.Argument(metavar="CSV", help="Tables that `upscale zoo` wrote.")]
MarkdownOption = Annotated[Path, typer.Option("--markdown", help="Where the document goes.")]

HELP = """\
Write one Markdown document from the tables of `upscale zoo`: a summary, the failures, every model.

Example:
  upscale coverage torchvision.csv timm.csv --markdown docs/coverage.md

Of two rows of the same model and settings the last one counts."""


def coverage(tables: Tables, markdown: MarkdownOption = Path("docs/coverage.md")) -> None:
    """The command; ``HELP`` is what it says of itself."""
    rows: list[Row] = []
    try:
        for path in tables:
            if not path.is_file():
                raise UsageError(f"there is no table {path}")
            for row in read_rows(path):
                rows = merged(rows, row)
        write_markdown(markdown, rows)
    except (BadTableError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"{summary(rows)}\nwritten to {markdown}")

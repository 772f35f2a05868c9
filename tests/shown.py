"""What a person sees of a table."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table


def shown(table: Table) -> str:
    """As on a terminal that is wide enough, without colours."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()

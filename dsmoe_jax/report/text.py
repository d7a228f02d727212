"""Tables for a terminal."""

from __future__ import annotations

from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.names import one_line


def to_text(table: Table) -> str:
    """Text of a table, with aligned columns."""
    lines = [[one_line(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i and not table.prose else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )

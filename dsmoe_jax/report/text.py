"""Results for a terminal."""

from __future__ import annotations

from typing import Any

from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.names import one_line
from dsmoe_jax.runs.summaries import MIN_DOMAIN_TOKENS


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


def held_out_text(result: dict[str, Any]) -> str:
    """Held-out results: a line a domain, then the whole text, then what its experts depend on."""
    rows = {one_line(name): row for name, row in result["domains"].items()} | {"all": result}
    width = max(map(len, rows))
    lines = [f"{'domain':{width}}  {'tokens':>10}  nats/token  bits/byte"]
    for name, row in rows.items():
        numbers = f"{row['tokens']:>10,}  {row['loss']:10.4f}  {row['bits_per_byte']:9.4f}"
        lines.append(f"{name:{width}}  {numbers}")
    if "load_by_domain" in result:
        lines.append(_specialisation(result.get("domain_specialisation")))
    if "batch_size" in result:
        lines.append(
            f"in batches of {result['batch_size']} sequences: a token's experts depend on the other"
            " tokens of its batch, so another --batch_size gives another loss"
        )
    return "\n".join(lines)


def _specialisation(by_layer: list[float] | None) -> str:
    if by_layer is None:
        return f"domain specialisation: takes two domains of {MIN_DOMAIN_TOKENS} tokens or more"
    numbers = " ".join(f"{value:.3f}" for value in by_layer)
    return (
        f"domain specialisation by layer: {numbers} (0: all domains use the same experts; 1: every"
        " expert serves one domain)"
    )

"""Figures as SVG: inside a page, or as a file of their own."""

from __future__ import annotations

import html
import io
import re

from matplotlib.figure import Figure

from dsmoe_jax.report.blocks import Picture
from dsmoe_jax.report.style import PALETTE, styled


def svg(figure: Figure) -> str:
    """A figure as an <svg> element in its own colours; the same figure gives the same text."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # a date would differ
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def themed_svg(picture: Picture) -> str:
    """A figure as an <svg> element of an HTML page, in light and dark colours and of any width."""
    text = svg(picture.figure)
    for colour in PALETTE:
        text = text.replace(colour, f"var(--c{colour[1:]})")
    # Ids are unique in a page only with the picture's name.
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{picture.name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"\n\s*", "\n", text)
    label = html.escape(f"{picture.title}. {picture.caption}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def standalone_svg(figure: Figure) -> str:
    """A figure as an SVG file, on white."""
    text = svg(figure)
    start = text.index(">") + 1
    return text[:start] + '\n<rect width="100%" height="100%" fill="#ffffff"/>' + text[start:]

"""Pictures and pages of this package inside a notebook.

Jupyter, VS Code and Colab ask a value how it wants to be shown, so nothing of them is imported.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from typing import Any

from matplotlib.figure import Figure

from dsmoe_jax.report.style import styled

PIXELS_PER_INCH = 130  # on the screen; the image has more, for screens with fine pixels


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure of this package, in its style; it need not be one of pyplot's."""

    figure: Figure

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, str], dict[str, Any]]:
        del options
        buffer = io.BytesIO()
        with styled():
            self.figure.savefig(buffer, format="png", dpi=2 * PIXELS_PER_INCH, facecolor="white")
        image = base64.b64encode(buffer.getvalue()).decode()
        width = round(PIXELS_PER_INCH * self.figure.get_figwidth())
        return {"image/png": image}, {"image/png": {"width": width}}


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole HTML page in a frame.

    Attributes:
      page: it may have scripts, and loads nothing.
      height: of the frame, in pixels.
    """

    page: str = dataclasses.field(repr=False)
    height: int = 600

    def _repr_html_(self) -> str:
        page = html.escape(self.page, quote=True)
        style = f"width:100%;height:{self.height}px;border:1px solid #d5d2cb"
        return f'<iframe srcdoc="{page}" style="{style}"></iframe>'

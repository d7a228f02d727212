"""Where what can be made again is kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where archives are kept: $DSMOE_CACHE, or ~/.cache/dsmoe_jax."""
    return Path(os.environ.get("DSMOE_CACHE") or Path.home() / ".cache" / "dsmoe_jax")

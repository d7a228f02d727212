"""The directory of this machine for what can be downloaded or built again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """$DSMOE_CACHE, or ~/.cache/dsmoe_jax: corpora and compiled kernels."""
    return Path(os.environ.get("DSMOE_CACHE") or Path.home() / ".cache" / "dsmoe_jax")

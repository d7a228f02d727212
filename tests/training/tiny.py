"""To go when all import tests.tools.tiny."""

from tests.tools.tiny import TINY  # noqa: F401

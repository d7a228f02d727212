"""To go when no test asks for it: processes inherit what makes compiling quick."""

import pytest


@pytest.fixture(scope="session")
def compile_cache() -> dict[str, str]:
    """Nothing to add to the environment."""
    return {}

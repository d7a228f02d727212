"""A bucket for the tests of this folder."""

import pytest

from tests.tools.buckets import emulator


@pytest.fixture(scope="package")
def bucket():
    """The emulator, with an empty bucket."""
    with emulator() as running:
        yield running


@pytest.fixture
def folder(bucket, request):
    """An address in the bucket that no other test uses."""
    return f"{bucket.address}/{request.node.name.partition('[')[0]}"

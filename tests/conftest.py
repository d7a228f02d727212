"""Fixtures that every test may use."""

from pathlib import Path

import pytest

from dsmoe_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a prepared corpus: four domains, 512 tokens, sequences of 64 inputs."""
    out = tmp_path_factory.mktemp("corpora") / "tiny"
    prepare("stdlib", out, vocab_size=512, sequence_length=64, max_bytes_per_domain=60_000)
    return out

"""Fixtures that every test may use."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from dsmoe_jax.config import Config
from dsmoe_jax.data.prepare import prepare
from tests.tools import compiling
from tests.tools.tiny import tiny

if TYPE_CHECKING:
    from dsmoe_jax.training.loop import Result

pytest_plugins = ["tests.tools.eight_devices"]
pytest.register_assert_rewrite("tests.tools.trees")  # so that its failures show values
compiling.set_flag()
gc.set_threshold(100_000, 20, 20)  # tracing makes millions of objects: 5 % of the time otherwise
# Time is no property of what is tested: a machine that is three times slower must pass too.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def compiling_quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all tests, and the processes that they start; see `full_optimisation`."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # of all workers: what one has compiled the others need not
    with compiling.compiling_quickly(directory / "compiled"):
        yield


@pytest.fixture
def full_optimisation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles as outside of tests, for tests of the compiled program: its size, its memory."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    with compiling.jax_settings(jax_disable_most_optimizations=False):
        yield


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a prepared corpus: four domains, 512 tokens, sequences of 64 inputs."""
    out = tmp_path_factory.mktemp("corpora") / "tiny"
    prepare("stdlib", out, vocab_size=512, sequence_length=64, max_bytes_per_domain=60_000)
    return out


@pytest.fixture(scope="session")
def tiny_config(tiny_corpus: Path) -> Callable[..., Config]:
    """`tiny_config(**{"train.steps": 4})`: the tiny config, with text, and dotted keys changed."""

    def make(**overrides: object) -> Config:
        return tiny(**{"data.corpus": str(tiny_corpus), **overrides})

    return make


@pytest.fixture(scope="module")
def shared_steps() -> Iterator[dict[Any, Any]]:
    """Runs of one config share their training step, see tests/tools/steps.py."""
    from tests.tools import steps  # imports as `finished_run` does

    with steps.sharing() as found:
        yield found


@pytest.fixture(scope="session")
def finished_run(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, "Result"]:
    """Workdir and result of a run that nothing disturbed; to be copied before it is changed."""
    from dsmoe_jax.training.loop import train  # most tests need not wait for its imports
    from tests.tools import steps

    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with steps.sharing():
        return workdir, train(tiny_config(), workdir, progress=False)

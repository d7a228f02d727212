"""A model so small that a run takes seconds, and one finished run of it to look at."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny import TINY

from dsmoe_jax.config import Config, replace
from dsmoe_jax.training.loop import Result, train


def _setting(key: str):
    """JAX hands out some settings as attributes and the others by `read`."""
    return getattr(jax.config, key) if hasattr(jax.config, key) else jax.config.read(key)


@contextlib.contextmanager
def compiling_quickly(directory: Path):
    """Compiles with little optimisation, and each program once: it is kept in the directory.

    Yields the environment variables that do the same in another process.
    """
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,  # compiles three times as fast
    }
    before = {key: _setting(key) for key in settings}
    for key, value in settings.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()  # else JAX does not look at the directory again
    yield {key.upper(): str(value) for key, value in settings.items()}
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compile_cache(compiled: Path):
    """The environment variables of `compiling_quickly`."""
    with compiling_quickly(compiled) as environment:
        yield environment


@pytest.fixture(scope="session")
def tiny_config(tiny_corpus: Path) -> Callable[..., Config]:
    """`tiny_config(**{"train.steps": 4})`: the tiny config with dotted keys changed."""

    def make(**overrides: object) -> Config:
        return replace(Config(), **{**TINY, "data.corpus": str(tiny_corpus), **overrides})

    return make


@pytest.fixture(scope="session")
def finished_run(
    tiny_config: Callable[..., Config],
    compiled: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Result]:
    """Workdir and result of a run that nothing disturbed; to be copied before it is changed."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with compiling_quickly(compiled):
        return workdir, train(tiny_config(), workdir, progress=False)

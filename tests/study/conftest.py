"""An experiment run with made-up training, for the tests of runner and report."""

import pathlib
from collections.abc import Callable

import pytest
from fakes import FakeTrain

from dsmoe_jax.study import runner
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.study.runner import Options
from dsmoe_jax.study.spec import Experiment
from experiments.table1 import EXPERIMENT


@pytest.fixture
def fake_run(tmp_path: pathlib.Path) -> Callable[..., Comparison]:
    """`fake_run(train, experiment=..., fingerprint=..., **options)` in a temporary directory."""

    def run(
        train: FakeTrain | None = None,
        experiment: Experiment = EXPERIMENT,
        fingerprint: str = "ab" * 32,
        scale: str = "smoke",
        **options,
    ) -> Comparison:
        options = Options(scale, results=str(tmp_path / "runs"), **options)
        return runner.run(experiment, options, train or FakeTrain(), lambda data: fingerprint)

    return run

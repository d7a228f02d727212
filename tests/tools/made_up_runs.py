"""Experiments with made-up training: a `train` that leaves a workdir like a real one."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from dsmoe_jax.config import Config
from dsmoe_jax.report import page
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.summaries import domain_specialisation, load_summary
from dsmoe_jax.study import runner
from dsmoe_jax.study.cells import Options
from dsmoe_jax.study.experiment import Experiment
from dsmoe_jax.study.results import Comparison
from experiments.v1.table1 import EXPERIMENT

FINAL_LOSS = {"dense_2b": 5.2, "hash_2b": 5.12, "switch_2b": 5.1, "gshard_2b": 5.0, "dsmoe_2b": 4.9}
DOMAINS = ("code_python", "en_books", "zh_news", "de_parliament")


class FakeTrain:
    """Called as `train(config, workdir)`; remembers what it was called with.

    Attributes:
      calls: (config name, seed) in order.
      stop_after: the call with this number raises KeyboardInterrupt half-way; None never.
      noise: standard deviation of the validation loss over seeds.
    """

    def __init__(self, stop_after: int | None = None, noise: float = 0.01):
        self.calls: list[tuple[str, int]] = []
        self.stop_after, self.noise = stop_after, noise

    def __call__(self, config: Config, workdir: pathlib.Path) -> None:
        self.calls.append((config.name, config.train.seed))
        with workdirs.claim(workdir, config):
            if len(self.calls) == self.stop_after:
                self._write(config, workdir, config.train.steps // 2)
                raise KeyboardInterrupt
            self._write(config, workdir, config.train.steps)

    def _write(self, config: Config, workdir: pathlib.Path, steps: int) -> None:
        rng = np.random.default_rng([config.train.seed, sum(map(ord, config.name))])
        batches = np.random.default_rng(config.train.seed).normal(0, 0.05, config.train.steps)
        final = FINAL_LOSS.get(config.name, 5.0) + rng.normal(0, self.noise)
        moe, layers = config.model.moe, config.model.num_hidden_layers
        rows = []
        for step in range(1, steps + 1):
            share = step / config.train.steps
            loss = final + 2.5 * float(np.exp(-4 * share))
            row = {
                "step": step,
                "tokens": step * config.tokens_per_step,
                "loss": loss + batches[step - 1] + rng.normal(0, 0.005),
                "tokens_per_second": 10_000.0,
            }
            if moe.n_routed_experts:
                load = rng.gamma(3 + 20 * share, 1, (layers, moe.n_routed_experts)) * 100
                load[:, : (config.train.steps - step) % 3] = 0  # some experts die and come back
                row |= load_summary(np.round(load))
                row["maxvio_running"] = row["maxvio"]
            if step % config.train.eval_every == 0 or step == config.train.steps:
                row |= {"validation_loss": loss, "validation_bits_per_byte": loss * 0.4}
            rows.append(json.dumps(row))
        (workdir / workdirs.METRICS).write_text("\n".join(rows) + "\n")
        if steps == config.train.steps:
            self._evaluate(config, workdir, final, rng)

    def _evaluate(self, config, workdir, loss, rng) -> None:
        def summary(factor: float) -> dict[str, float]:
            value = loss * factor
            return {"loss": value, "bits_per_byte": 0.4 * value, "tokens": 1000, "bytes": 3600}

        found = {"step": config.train.steps, **summary(1.0)}
        if config.model.moe.n_routed_experts:
            shape = config.model.num_hidden_layers, config.model.moe.n_routed_experts
            load_LE = np.round(rng.gamma(6, 1, shape) * 100)
            found |= load_summary(load_LE) | self._by_domain(load_LE.astype(int))
        shifts = rng.normal(0, 0.01, len(DOMAINS))
        found["domains"] = {
            name: summary(0.8 + 0.12 * i + shift)
            for i, (name, shift) in enumerate(zip(DOMAINS, shifts, strict=True))
        }
        json_files.write(workdir / workdirs.EVALUATION, found)

    @staticmethod
    def _by_domain(load_LE: np.ndarray) -> dict[str, object]:
        """A load in parts for the domains, by other random numbers than the rest."""
        rng = np.random.default_rng(load_LE.sum())
        shares_LEG = rng.dirichlet(np.ones(len(DOMAINS)), load_LE.shape)
        load_GLE = np.moveaxis(rng.multinomial(load_LE, shares_LEG), -1, 0)
        return {
            "load_by_domain": dict(zip(DOMAINS, load_GLE.tolist(), strict=True)),
            "domain_specialisation": domain_specialisation(load_GLE, np.full(len(DOMAINS), 1000)),
        }


def run_made_up(
    results: pathlib.Path,
    train: FakeTrain | None = None,
    experiment: Experiment = EXPERIMENT,
    fingerprint: str = "ab" * 32,
    scale: str = "smoke",
    report: bool = False,
    **options,
) -> Comparison:
    """Runs an experiment with made-up training, and writes its report if asked to."""
    options = Options(scale, results=str(results), **options)
    made = runner.run(experiment, options, train or FakeTrain(), lambda data: fingerprint)
    if report:
        page.write(made, options.directory(experiment))
    return made


@pytest.fixture
def fake_run(tmp_path: pathlib.Path) -> Callable[..., Comparison]:
    """`fake_run(train, experiment=..., fingerprint=..., **options)` in a temporary directory."""
    return functools.partial(run_made_up, tmp_path / "runs")

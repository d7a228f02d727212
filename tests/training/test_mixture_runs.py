"""Runs with a mixture of domains: what the log says of it, going on, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_jax.config import Config
from dsmoe_jax.runs.board import scalars
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("shared_steps")
SIZES = {"train.steps": 6, "train.log_every": 2, "train.checkpoint_every": 3, "train.eval_every": 6}
MIXTURE = {
    "train.stages.share": (0.5, 0.5),
    "train.stages.data.mixture.code_python": (3, 1),
    "train.stages.data.mixture.unicode_names": (1, ((0.0, 1), (1.0, 3))),
}
_READ = ("domain_tokens", "domain_share", "domain_epochs")


def test_the_mixture_is_in_the_log_whatever_interrupts(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(**SIZES, **MIXTURE)
    train(config, tmp_path / "whole", progress=False)
    rows = read_rows(tmp_path / "whole")
    for row in rows:
        assert sum(row["domain_tokens"].values()) == row["tokens"]
        assert sum(row["domain_share"].values()) == pytest.approx(1)
    assert rows[0]["domain_tokens"].keys() == {"code_python", "unicode_names"}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 6]
    by_step = {row["step"]: row["domain_tokens"]["code_python"] for row in rows}
    assert by_step[3] == 9 * 64  # three quarters of 12 sequences
    # The second stage: 1/(1 + w) where w goes from 2 to 3; its integral over 12 sequences is 3.5.
    assert (by_step[6] - by_step[3]) / 64 in (3, 4)
    last, before = rows[-1]["domain_tokens"], rows[-2]["domain_tokens"]
    read = {name: last[name] - before[name] for name in last}
    assert rows[-1]["domain_share"] == {name: n / (2 * 4 * 64) for name, n in read.items()}
    curves = dict(scalars(rows[-1]))
    assert curves["domain_tokens/code_python"] == last["code_python"]
    assert curves["domain_share/unicode_names"] == rows[-1]["domain_share"]["unicode_names"]

    _stop_after(3, monkeypatch, config, tmp_path / "interrupted")
    train(config, tmp_path / "interrupted", progress=False)
    again = read_rows(tmp_path / "interrupted")
    keys = ("step", "loss", "grad_norm", *_READ)
    assert [[row[key] for key in keys] for row in again] == [[r[key] for key in keys] for r in rows]


def _stop_after(step: int, monkeypatch: pytest.MonkeyPatch, config: Config, workdir: Path):
    """Trains until a step has been saved."""
    from dsmoe_jax.runs.checkpoint import Checkpoints

    save = Checkpoints.save

    def stop(self: Checkpoints, at: int, *args: object, **kwargs: object):
        save(self, at, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        if at == step:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir, progress=False)


def test_weights_are_refused_before_anything_is_written(
    tiny_config: Callable[..., Config], tmp_path: Path
):
    config = tiny_config(**{"data.mixture.code": 1})
    with pytest.raises(
        ValueError, match=r"mixture\.code=1: the corpus has no such domain; must be"
    ):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

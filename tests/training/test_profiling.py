"""A trace has the steps and the parts of the model, and changes no number of the run."""

import os
import re
import signal

import jax
import pytest

from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.interrupt import Stopped
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.profiling import WARM_UP
from dsmoe_jax.training.trainer import Trainer

SCOPES = ("attention", "router", "dispatch", "experts", "shared_experts", "head")


def traces(workdir):
    return sorted((workdir / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))


def losses(workdir):
    return [row["loss"] for row in read_rows(workdir) if "loss" in row]


def steps_of(trace):
    """Numbers of the training steps that a trace names."""
    profile = jax.profiler.ProfileData.from_file(str(trace))
    events = (event for plane in profile.planes for line in plane.lines for event in line.events)
    return sorted({dict(event.stats)["step_num"] for event in events if event.name == "train"})


def test_trace_has_its_steps_and_the_parts_of_the_model(
    tiny_config, tmp_path, finished_run, capsys
):
    undisturbed, _ = finished_run
    train(tiny_config(), tmp_path / "run", profile=2)
    (trace,) = traces(tmp_path / "run")
    assert steps_of(trace) == [WARM_UP + 1, WARM_UP + 2]
    content = trace.read_bytes()
    missing = [scope for scope in SCOPES if not re.search(rf"\b{scope}[/)]".encode(), content)]
    assert not missing
    assert losses(tmp_path / "run") == losses(undisturbed)
    message = f"profile of steps {WARM_UP + 1} to {WARM_UP + 2}: xprof --logdir="
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("n_steps", [0, 8])
def test_steps_that_the_run_does_not_have(tiny_config, tmp_path, n_steps):
    with pytest.raises(ValueError, match=rf"--profile={n_steps}: must be 1 to 7, the steps .* 0 a"):
        train(tiny_config(), tmp_path / "run", profile=n_steps)
    assert not traces(tmp_path / "run")


def test_an_interrupted_trace_is_ended(tiny_config, tmp_path, monkeypatch):
    report = Trainer._report

    def killed(trainer, pending):
        if pending.step == WARM_UP + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        report(trainer, pending)

    monkeypatch.setattr(Trainer, "_report", killed)
    with pytest.raises(Stopped):
        train(tiny_config(), tmp_path / "run", progress=False, profile=5)
    assert len(traces(tmp_path / "run")) == 1
    monkeypatch.undo()
    train(tiny_config(), tmp_path / "run", progress=False)  # without a trace that still runs
    assert len(traces(tmp_path / "run")) == 1

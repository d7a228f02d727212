"""Two processes train one model: killed, stopped and restarted, or started wrongly."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dsmoe_jax.config import Config, replace
from dsmoe_jax.parallel import hosts
from dsmoe_jax.training.metrics import read_rows

TINY = {
    "name": "tiny",
    "model.vocab_size": 512,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 2,
    "model.head_dim": 8,
    "model.moe.n_routed_experts": 4,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.expert_backend": "loop",
    "data.sequence_length": 64,
    "data.tokenizer_vocab_size": 512,
    "optimizer.warmup_steps": 2,
    "train.steps": 16,
    "train.global_batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 100,
    "train.eval_batches": 1,
    "mesh.data": 1,
    "mesh.fsdp": 2,
}
A_MINUTE = 60


@pytest.fixture(scope="module")
def launch(tiny_corpus, tmp_path_factory):
    """`launch(workdir, n, *flags)`: the training command as n processes with two devices in all."""
    directory = tmp_path_factory.mktemp("hosts")
    config = directory / "tiny.py"
    config.write_text(
        "from dsmoe_jax.config import *\n\ndef get_config():\n    return to_config_dict(\n"
        f"        {replace(Config(), **TINY, **{'data.corpus': str(tiny_corpus)})!r})\n"
    )

    def start(workdir: Path, n: int, *last_flags: str) -> list[subprocess.Popen]:
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // n}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.getcwd(),
        }
        command = [sys.executable, "-m", "dsmoe_jax.train", f"--config={config}"]
        command.append(f"--workdir={workdir}")
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        meet = [[address, f"--num_processes={n}", f"--process_id={i}"] for i in range(n)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return [
            subprocess.Popen(
                command + (m if n > 1 else []) + list(last_flags if m is meet[-1] else ()),
                env=environment,
                **pipes,
            )
            for m in meet
        ]

    return start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ended(processes, timeout=150):
    """Exit codes and error output, when all have ended."""
    errors = [p.communicate(timeout=timeout)[1] for p in processes]
    return [p.returncode for p in processes], errors


def wait_for_row(processes, workdir, n):
    end = time.monotonic() + 150
    while not (workdir / "metrics.jsonl").exists() or len(read_rows(workdir)) < n:
        assert time.monotonic() < end
        assert all(p.poll() is None for p in processes), ended(processes)[1]
        time.sleep(0.01)


def test_stopped_and_killed_at_random_two_processes_do_what_one_does(launch, tmp_path):
    """SIGTERM to one stops both after the same step; SIGKILL of one ends the other in time.

    Then the same commands go on, and the losses are bit for bit those of one process with both
    devices that nothing disturbed.
    """
    codes, errors = ended(launch(tmp_path / "one", 1))
    assert codes == [0], errors
    seed = int.from_bytes(os.urandom(2), "big")
    moment, workdir = random.Random(seed), tmp_path / "two"

    processes = launch(workdir, 2)
    wait_for_row(processes, workdir, moment.randint(1, 4))
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = ended(processes)
    assert codes == [143, 143], (seed, errors)
    stopped = len(read_rows(workdir))
    assert f"stopped by SIGTERM after step {stopped}" in errors[0]
    assert (workdir / f"checkpoints/{stopped}").is_dir()

    processes = launch(workdir, 2)
    victim = moment.randint(0, 1)
    wait_for_row(processes, workdir, stopped + moment.randint(1, 4))
    processes[victim].kill()
    start = time.monotonic()
    codes, errors = ended(processes, timeout=A_MINUTE)
    assert time.monotonic() - start < A_MINUTE
    assert codes[1 - victim] not in (0, None), (seed, victim, errors)

    codes, errors = ended(launch(workdir, 2))
    assert codes == [0, 0], (seed, errors)
    numbers = ("step", "loss", "total_loss", "grad_norm", "load", "validation_loss")
    rows, wanted = (
        [{k: row[k] for k in numbers if k in row} for row in read_rows(tmp_path / d)]
        for d in ("two", "one")
    )
    assert len(rows) == 16
    assert rows == wanted, seed
    assert_written_by_the_right_ones(workdir)


def assert_written_by_the_right_ones(workdir):
    """Arrays by both processes, everything else by the first: one lock, one TensorBoard a start."""
    shards = {p.name for p in (workdir / "checkpoints/16/state").glob("ocdbt.process_*")}
    assert shards == {"ocdbt.process_0", "ocdbt.process_1"}
    assert len([*(workdir / "tensorboard").iterdir()]) == 3
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "total_loss" in line]
    assert steps == list(range(1, 17))


def test_processes_with_different_configs_all_end_with_the_difference(launch, tmp_path):
    processes = launch(tmp_path / "run", 2, "--config.train.seed=1")
    codes, errors = ended(processes, timeout=A_MINUTE)
    assert codes == [2, 2]
    for error in errors:
        (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert line == (
            "error: --config: processes 0 and 1 were given different ones (train.seed: 0 and 1);"
            " all must be given the same"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers_are_recognised(monkeypatch, environment, several):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.detected() is several


@pytest.mark.parametrize("given", [(0,), (0, 1), (0, 2), (1, 2)])
def test_half_an_address_is_refused(given):
    values = [("localhost:1", 2, 0)[i] if i in given else None for i in range(3)]
    with pytest.raises(ValueError, match=r"--.*: missing; .* belong together"):
        hosts.join(*values)


def test_one_process_agrees_with_itself():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.on_first(lambda: 3) == 3
    assert hosts.Vote(jax.make_mesh((1,), ("data",)))(15) == 15

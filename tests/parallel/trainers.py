"""Starts the training command as several processes of this machine, again and again.

Half of the start of a trainer is imports.  They are done once, in a process that forks the trainers
(multiprocessing's forkserver); from there on each does what `python -m dsmoe_jax train` does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

from dsmoe_jax.runs.metrics_log import read_rows
from tests.tools.patience import PATIENCE
from tests.tools.tiny import tiny

CONFIG = {
    "train.steps": 16,
    "train.keep_checkpoints": 100,
    "train.eval_every": None,
    "train.eval_batches": 1,
    "train.record_routing": True,
    "train.analyse_every": 8,
    "mesh.data": 1,
    "mesh.fsdp": 2,
}


class Trainer:
    """One process; what it says goes to a file."""

    def __init__(self, process: multiprocessing.Process, says: Path):
        self.process, self.says = process, says
        process.start()

    def send(self, signum: int) -> None:
        """Sends it a signal."""
        os.kill(self.process.pid, signum)

    def end(self, timeout: float) -> tuple[int | None, str]:
        """Waits; its exit code (None if it is still there) and what it said."""
        self.process.join(timeout)
        return self.process.exitcode, self.says.read_text()


class Run:
    """A run of n processes: its workdir, and who takes part.

    Args:
      launcher: of which the config and the environment are.
      workdir: a new one, or that of a run that is to go on.
      n: processes.
      changes: of the config, as on the command line but for `--config.`.
      before: what a process, by its number, does before it trains.
      self_check: whether they compare themselves with the dense loop first, which takes seconds.
    """

    def __init__(
        self,
        launcher: Launcher,
        workdir: Path,
        n: int,
        *changes: str,
        before: Mapping[int, Callable[[], None]] = MappingProxyType({}),
        self_check: bool = False,
    ):
        self.workdir, more = workdir, [f"--config.{change}" for change in changes]
        more.append("--self_check" if self_check else "--noself_check")
        self.trainers = [
            launcher.start(arguments + more, n, before.get(i))
            for i, arguments in enumerate(launcher.commands(workdir, n))
        ]

    def wait_for_row(self, n: int) -> None:
        """Until n steps are logged."""
        self.wait_until(lambda: (self.workdir / "metrics.jsonl").exists() and self._rows() >= n)

    def wait_for_checkpoint(self) -> None:
        """Until one is whole: it is written in the background, and may be later than its row."""
        self.wait_until(lambda: any((self.workdir / "checkpoints").glob("[0-9]")))

    def _rows(self) -> int:
        return len(read_rows(self.workdir))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until a condition holds; fails if a process ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            assert all(t.process.is_alive() for t in self.trainers), self.end()
            time.sleep(0.01)

    def end(self, timeout: float = PATIENCE) -> tuple[list[int | None], list[str]]:
        """Waits for all; exit codes and what they said."""
        end = time.monotonic() + timeout
        codes, said = zip(
            *(t.end(max(0, end - time.monotonic())) for t in self.trainers), strict=True
        )
        return list(codes), list(said)


class Launcher:
    """Makes runs of one tiny config, which share a cache of compiled programs.

    Args:
      directory: for the config, the cache, and what the processes say.
      corpus: a prepared one.
    """

    def __init__(self, directory: Path, corpus: Path):
        self.directory, self.config = directory, directory / "tiny.py"
        config = tiny(**CONFIG, **{"data.corpus": str(corpus)})
        self.config.write_text(
            "from dsmoe_jax.config import *\n\n\ndef get_config():\n"
            f"    return to_config_dict({config!r})\n"
        )
        # The rest of what makes compiling quick is in the environment already.
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "PYTHONPATH": os.getcwd(),
        }
        self.context = multiprocessing.get_context("forkserver")
        # What a trainer imports, late too.
        modules = ["dsmoe_jax.commands.train", "tensorboardX", "gcsfs", "google.cloud.storage"]
        self.context.set_forkserver_preload(modules)
        with mock.patch.dict(os.environ, self.environment):  # JAX reads it when it is imported
            multiprocessing.forkserver.ensure_running()
        self.started: list[Trainer] = []

    def commands(self, workdir: Path, n: int) -> list[list[str]]:
        """The arguments of n processes that train together."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{s.getsockname()[1]}"
        mesh = f"--config.mesh.expert={devices(n) // 2}"
        command = [f"--config={self.config}", mesh, f"--workdir={workdir}", "--report_every=0"]
        meet = [[address, f"--num_processes={n}", f"--process_id={i}"] for i in range(n)]
        return [command + (m if n > 1 else []) for m in meet]

    def start(
        self, arguments: list[str], n: int, before: Callable[[], None] | None = None
    ) -> Trainer:
        """Starts one of the n processes of a run."""
        says = self.directory / f"{len(self.started)}.txt"
        says.touch()  # it may be killed before it says anything
        process = self.context.Process(target=_train, args=(arguments, xla_flags(n), says, before))
        self.started.append(Trainer(process, says))
        return self.started[-1]

    def clean_up(self) -> None:
        """Leaves no process behind, whatever a test did."""
        for trainer in self.started:
            trainer.process.kill()
            trainer.process.join()


def devices(n: int) -> int:
    """CPU devices of a run of n processes: two, or one for each."""
    return max(2, n)


def xla_flags(n: int) -> str:
    """For one of n processes: its part of the devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices(n) // n}"


def _train(arguments: list[str], flags: str, says: Path, before: Callable[[], None] | None) -> None:
    """Trains, in a forked process."""
    from jax._src import cache_key

    from dsmoe_jax.commands import command_line
    from dsmoe_jax.commands import train as command
    from dsmoe_jax.parallel import hosts
    from dsmoe_jax.runs import claims
    from dsmoe_jax.storage import files, places

    with open(says, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["XLA_FLAGS"] = flags
    hosts.HEARTBEAT_SECONDS = 12  # how long the test of a frozen process waits
    hosts.CONNECT_SECONDS = 60  # one may be killed before it does
    # A bucket is asked, added to and given up sooner, too.
    places._SECONDS, files.APPEND_SECONDS = 3.0, 1.0
    claims.BEAT_SECONDS, claims.DEAD_SECONDS = 1.0, 8.0
    # On CPU each process hashes the devices in another order, and finds nothing of what the first
    # one, which alone writes, has put into the cache.
    cache_key._hash_accelerator_config = lambda *_: None
    if before is not None:
        before()
    command_line.run(command.main, arguments)

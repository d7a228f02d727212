"""A run from its config to its result: `train`.

It makes sure that the config can be trained, on these devices and in this workdir, and opens the
text; `Trainer.run` in trainer.py then goes through the steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax

from dsmoe_jax.config import Config
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.parallel import hosts
from dsmoe_jax.progress import ProgressLine, Silent
from dsmoe_jax.runs import going_on, loading
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.training.checks import check_config, check_on_mesh
from dsmoe_jax.training.derived import derive
from dsmoe_jax.training.devices import fallen_back, on_devices, open_mesh
from dsmoe_jax.training.interrupt import Interrupts
from dsmoe_jax.training.results import Result, read_finished
from dsmoe_jax.training.run_log import Watch
from dsmoe_jax.training.self_check import self_check as check_devices
from dsmoe_jax.training.trainer import NonFinite as NonFinite
from dsmoe_jax.training.trainer import Trainer


def train(
    config: Config,
    workdir: str | Path,
    *,
    progress: bool = True,
    go_back: bool = False,
    profile: int | None = None,
    watch: Watch | None = None,
    wandb: str | None = None,
    self_check: bool | None = None,
) -> Result:
    """Trains a model, or goes on where the run in `workdir` stopped.

    A finished run is returned as it is.  The same config gives the same losses bit for bit, however
    often the run was interrupted.

    Args:
      config: of the run; some keys may have changed on the way, see runs/going_on.py.
      workdir: where everything is kept, see runs/workdir.py.
      progress: whether to show a progress line on stderr.
      go_back: whether steps that have been made may be left for the last one before the change.
      profile: how many steps to trace, see profiling.py; None is none.
      watch: is shown the rows as they come, by the first process; None: nobody looks.
      wandb: a project of Weights & Biases that gets the rows too, see runs/wandb_board.py.
      self_check: whether one tiny step is compared with the dense loop before the first step of
        this call, see self_check/; None: on more than one device.

    Raises:
      ValueError: for a config, corpus or workdir that cannot be used, devices that compute
        something else than the dense loop, `NonFinite` and `Violated`.
      OSError: if the disk is full.
      Stopped: after SIGTERM or Ctrl-C; everything is saved.
    """
    config = asked = derive(config)
    check_config(config)
    hosts.require_same_config(config)
    config = on_devices(config, jax.device_count())
    speaks = progress and hosts.is_first()
    line = ProgressLine(config.name, config.train.steps) if speaks else Silent()
    if config != asked:
        line.message(f"{config.name}: {fallen_back(asked, config)}")
    directory = place_of("--workdir", workdir)
    go_on = functools.partial(going_on.prepare, go_back=go_back)
    mesh = open_mesh(config)
    with jax.set_mesh(mesh):
        check_on_mesh(config)  # before anything is written
    asks_for_check = mesh.size > 1 if self_check is None else self_check
    if asks_for_check and hosts.on_first(lambda: going_on.takes_a_step(directory, config)):
        line.note("self-check")
        line.message(f"{config.name}: {check_devices(config, mesh)}")
    # The one who watches is closed last, when the workdir is free again.
    with _closing(watch), jax.set_mesh(mesh), workdirs.claim(directory, config, go_on):
        finished = hosts.on_first(lambda: read_finished(directory, config))
        moved = hosts.on_first(lambda: workdirs.MOVED in workdirs.changes(directory, config))
        if finished is not None:
            if moved:
                _open_corpus(config, directory, moved=True)
            line.message(f"{config.name}: finished already ({config.train.steps} steps)")
            return Result(**finished)
        corpus = _open_corpus(config, directory, moved=moved)
        journal = Journal(directory)
        with journal.failures(), Interrupts() as interrupts, hosts.one_line_if_another_ends():
            seen_by = line, journal, watch, wandb
            trainer = Trainer(config, directory, corpus, interrupts, profile, *seen_by)
            try:
                return trainer.run()
            finally:
                trainer.close()


@contextlib.contextmanager
def _closing(watch: Watch | None) -> Iterator[None]:
    """Closes it after everything else."""
    try:
        yield
    finally:
        if watch is not None:
            watch.close()


def _open_corpus(config: Config, directory: Path, *, moved: bool) -> Corpus:
    """Opens the corpus of a run and notes in its workdir where it is.

    Raises:
      ValueError: if there is none, or one that has moved is of other text.
    """
    corpus = hosts.first_then_all(lambda: open_corpus(config.data))
    hosts.require_same("data.corpus", corpus.fingerprint)
    if moved:
        loading.check_moved(directory, corpus)
    hosts.on_first(lambda: workdirs.keep(directory, config, corpus.tokenizer))
    return corpus

"""The steps of a run: batches in, checkpoints and metrics out.

Step n is handed to the device before the metrics of step n-1 are fetched, so the device never
waits for the host to read, check or write numbers.  `Trainer.run` is the loop; beside it:

    start.py            the state that a run begins with
    stages.py           the data and the compiled step (step.py) of a stage
    due.py              the steps after which it logs, evaluates, analyses and saves
    ballot.py           stopping and saving, in which all processes must agree
    run_log.py, speeds.py    the rows that it writes
    saving.py           its checkpoints
    measuring.py        held-out text
    spike_response.py   what is done about a spike
"""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsmoe_jax.config import Config, stage_of
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import tokenizer_fingerprint
from dsmoe_jax.hardware.peak import peak_flops
from dsmoe_jax.parallel import hosts
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs import events, routing_records
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.training import invariants
from dsmoe_jax.training.ballot import Ballot
from dsmoe_jax.training.due import Due
from dsmoe_jax.training.host_times import DATA, WORK
from dsmoe_jax.training.interrupt import Interrupts, Stopped
from dsmoe_jax.training.measuring import Measuring
from dsmoe_jax.training.profiling import Profiler
from dsmoe_jax.training.results import Result, read_finished, write_evaluation
from dsmoe_jax.training.rows import RunningLoad, first_non_finite, shown
from dsmoe_jax.training.run_log import RunLog, Watch
from dsmoe_jax.training.saving import Saver
from dsmoe_jax.training.speeds import Speeds
from dsmoe_jax.training.spike_response import SpikeResponse
from dsmoe_jax.training.stages import StageRun, kernels_of
from dsmoe_jax.training.start import TrainState, start
from dsmoe_jax.training.step import StepMetrics
from dsmoe_jax.training.teacher import Teacher, check_same_teacher, load_teacher


class NonFinite(ValueError):
    """The loss or the gradient of a step is not a number any more."""


class _Pending(NamedTuple):
    """A step that was handed to the device, and what is to be fetched of it.

    Attributes:
      step: its number.
      metrics: of the step.
      vote: of all processes, see ballot.py.
      times: of the hosts, see speeds.py; None for a step without a row.
    """

    step: int
    metrics: StepMetrics
    vote: jax.Array | int
    times: Any


class Trainer:
    """One call of `train`: the state, and what it is fed from and written to."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        corpus: Corpus,
        interrupts: Interrupts,
        profile: int | None,
        line: ProgressLine,
        journal: Journal,
        watch: Watch | None,
        wandb: str | None,
    ):
        mesh = jax.sharding.get_mesh()
        self.config = config
        self.corpus = corpus
        self.directory = directory
        self.line = line
        self.profile = profile
        self.journal = journal
        self.recorder, self.recording = routing_records.of_run(
            config, directory, corpus.fingerprint
        )
        self.due = Due(config, replays=self.recording is not None)
        self.log = RunLog(config, directory, watch, wandb)
        self.saver = Saver(config, directory, self.log, journal)
        self.ballot = Ballot(interrupts, self.saver.timer, mesh)
        self.speeds = Speeds(config, mesh)
        self.measuring = Measuring(config, directory, corpus, self.log, journal)
        self.spikes = SpikeResponse(config, journal, line)
        self.teacher: Teacher | None = None
        self.profiler: Profiler | None = None

    def close(self) -> None:
        """Lets everything go; a checkpoint that is being written is finished first."""
        if self.profiler is not None:
            self.profiler.close()
        self.line.close()
        self.speeds.close()
        self.log.close()
        self.saver.checkpoints.close()

    def run(self) -> Result:
        """Trains to the last step and evaluates."""
        state, first, resumed_from = self._start()  # and the stage that it belongs to
        self.profiler = Profiler(
            self.directory / workdirs.TENSORBOARD,
            self.profile,
            first,
            self.config.train.steps,
            self.line.message,
        )
        self._open_log(first)
        names = hosts.gather(socket.gethostname())
        self.journal.add(events.START if resumed_from is None else events.RESUME, hosts=names)
        self._settle(first, state)  # a run that was killed while evaluating has that still to do
        peak_flops()  # measured before the clock runs
        self._name_kernels()
        self.line.note("compiling the training step")
        pending: _Pending | None = None
        step = first
        while step < self.config.train.steps:
            step += 1
            if step > self.now.stage.end:
                state = self._next_stage(step, state)
            with self.speeds.spent(DATA):
                batch = self.now.next_batch(step)
            with self.profiler.step(step, state):
                state, metrics = self.now.train_step(state, batch)
            self.profiler.after(step, state)
            self.speeds.dispatched(metrics.loss)
            if pending is not None:
                self._report(pending)  # while the device is at work on this step
            times = self.speeds.gather() if self.due.row(step) else None
            pending = _Pending(step, metrics, self.ballot.cast(), times)
            must_pause = self.due.pause(step) or self.ballot.asks_to_save
            if must_pause and not self.spikes.must_rewind:
                self._report(pending)
                pending = None
                if not self.spikes.must_rewind:
                    self._settle(step, state)
            if self.spikes.must_rewind:
                state = pending = metrics = None  # the checkpoint needs their memory
                state, step = self._rewind()
        result = hosts.on_first(lambda: read_finished(self.directory, self.config))
        self.journal.add(events.END, loss=result["evaluation"]["loss"])
        return Result(**result | {"resumed_from": resumed_from})

    def _start(self) -> tuple[TrainState, int, int | None]:
        """The state to go on from, its step, and the checkpoint that it came from."""
        state, step, extra = start(self.config, self.saver.checkpoints, self.corpus)
        self.teacher = load_teacher(self.config, self.corpus)
        window = self.spikes.decisions.restore((extra or {}).get("spikes"))
        state = state._replace(spikes=window)
        if extra is None:
            self.now = self._stage(0)
            return state, 0, None
        check_same_teacher(self.config, self.teacher, extra.get("teacher"))
        self.now = self._stage(step, extra["data"])
        self.log.running_load = RunningLoad(extra["running_load"])
        self.line.message(f"{self.config.name}: going on from step {step}")
        return state, step, step

    def _open_log(self, step: int) -> None:
        """Opens the log, cut off after the step that the run goes on from."""
        self.log.open(step)
        self.measuring.go_back(step)
        self.speeds.begin(step)
        self.saver.saved_step = self.journal.step = step

    def _stage(self, step: int, position: dict[str, Any] | None = None) -> StageRun:
        routing = self.recorder, self.recording
        stage = stage_of(self.spikes.decisions.config(), step)
        return StageRun(stage, self.corpus, position, *routing, self.teacher)

    def _next_stage(self, step: int, state: TrainState) -> TrainState:
        """Makes the stage of a step ready; its losses are compared with its own alone."""
        self.now = self._stage(step, self.now.position())
        self._name_kernels()
        self.line.note(f"compiling the training step of the stage from step {step}")
        self.speeds.restart()
        self.journal.add(events.STAGE, from_step=step)
        return state._replace(spikes=self.spikes.decisions.restore(None))

    def _name_kernels(self) -> None:
        """Says which kernels the stage uses, now and in the next row."""
        self.log.kernels = kernels_of(self.now.stage.config)
        names = ", ".join(f"{what} {name}" for what, name in self.log.kernels.items())
        if names:
            self.line.message(f"{self.config.name}: kernels: {names}")

    def _rewind(self) -> tuple[TrainState, int]:
        """Goes back to the newest checkpoint, past the data that were read since."""
        self.saver.checkpoints.wait()
        self.spikes.rewind(max(self.saver.checkpoints.steps(), default=0))
        self.log.close()
        before = self.now
        self.log.running_load = RunningLoad()
        state, step, _ = self._start()
        if self.now.stage.first == before.stage.first:
            self.now.take_compiled(before)
        else:
            self._name_kernels()
        self._open_log(step)
        return state, step

    def _report(self, pending: _Pending) -> None:
        """Waits for a step, checks it, and writes its row if it is to be logged."""
        step, metrics, vote, times = jax.device_get(pending)
        self.saver.checkpoints.check()
        with self.speeds.spent(WORK):
            self.ballot.hear(vote)
            is_out = self.spikes.takes_out(step, metrics.judged)
            if not self.spikes.must_rewind:
                self._require_sound(step, metrics, may_be_non_finite=is_out)
                self.journal.step = step
                if not is_out:
                    self.log.running_load.add(metrics)
                self._write(step, metrics, times)

    def _require_sound(self, step: int, metrics: StepMetrics, *, may_be_non_finite: bool) -> None:
        if not may_be_non_finite and (found := first_non_finite(metrics)) is not None:
            raise NonFinite(self.saver.stopped(step, "{}={}".format(*found)))
        if (broken := invariants.violation(metrics)) is not None:
            raise invariants.Violated(self.saver.stopped(step, broken))

    def _write(self, step: int, metrics: StepMetrics, times: Any) -> None:
        if self.recorder is not None:
            assert metrics.router is not None
            assert metrics.recorded is not None
            self.recorder.write(routing_records.TRAIN, step, metrics.recorded)
        if self.due.row(step):
            speeds = self.speeds.row(step, self.now.stage.config, times)
            self.log.write_step(step, metrics, self.now, speeds, self.spikes.decisions.row())
        self.line.update(step, loss=f"{float(metrics.loss):.4f}", **shown(self.log.rows))

    def _settle(self, step: int, state: TrainState) -> None:
        """Saves, stops, analyses and evaluates, each if it is due and not done."""
        if self.due.checkpoint(step) or self.ballot.asks_to_save:
            self._save(step, state)
        if self.ballot.signum is not None:
            self._stop(step, state)
        if self.due.analysis(step):
            self.line.note("where held-out text is routed")
            self.measuring.analyse(step, state, self.now.held_out)
            self.speeds.restart()
        if self.due.evaluation(step):
            self._evaluate(step, state)
            self.speeds.restart()

    def _save(self, step: int, state: TrainState) -> None:
        self.ballot.settle_saving()
        if step == self.saver.saved_step:
            return
        more = {
            "data": self.now.position(),
            "corpus": self.corpus.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.corpus.tokenizer),
            "running_load": self.log.running_load.saved(),
        }
        if (decided := self.spikes.decisions.saved(state.spikes)) is not None:
            more["spikes"] = decided
        if self.teacher is not None:
            more["teacher"] = self.teacher.identity
        self.saver.save(step, state, more)

    def _stop(self, step: int, state: TrainState) -> None:
        signum = self.ballot.signum
        assert signum is not None
        self._save(step, state)
        self.saver.checkpoints.wait()
        name = signal.Signals(signum).name
        self.line.message(
            f"{self.config.name}: stopped by {name} after step {step}, saved in {self.directory};"
            " the same command goes on from there"
        )
        self.journal.add(events.STOPPED, signal=name)
        raise Stopped(signum)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Measures on held-out text; after the last step the run is finished with that."""

        def stop_if_asked(done: int) -> None:
            self.line.note(f"held-out text, {done}/{self.now.held_out.n_batches} batches")
            self.ballot.hear(self.ballot.cast())
            if self.ballot.signum is not None:
                self._stop(step, state)

        result = self.measuring.evaluate(step, state, self.now.held_out, stop_if_asked)
        if step == self.config.train.steps:
            assert result is not None
            self.log.flush()
            self.saver.checkpoints.wait()
            if hosts.is_first():
                write_evaluation(self.directory, step, result, self.log.rows)

"""The training loop: batches in, checkpoints and metrics out.

Step n is handed to the device before the metrics of step n-1 are fetched, so the device never
waits for the host to read, check or write numbers.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from dsmoe_jax.analysis import over_training
from dsmoe_jax.analysis.over_training import OverTraining
from dsmoe_jax.analysis.routed_text import check_routes, with_routing
from dsmoe_jax.config import Config, stage_of, stages_of, tokens_after
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import open_corpus, tokenizer_fingerprint
from dsmoe_jax.hardware.peak import peak_flops
from dsmoe_jax.model.size import train_flops_per_token
from dsmoe_jax.parallel import hosts
from dsmoe_jax.progress import ProgressLine, Silent
from dsmoe_jax.runs import events, going_on, json_files, loading, routing_records
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.runs.metrics_log import KERNELS, MetricsLog, NoLog, read_rows
from dsmoe_jax.training import invariants, spikes
from dsmoe_jax.training.clock import DeviceClock
from dsmoe_jax.training.derived import derive
from dsmoe_jax.training.devices import fallen_back, on_devices, open_mesh
from dsmoe_jax.training.host_times import DATA, WORK, HostTimes
from dsmoe_jax.training.interrupt import Interrupts, Stopped
from dsmoe_jax.training.optimizer import make_schedule
from dsmoe_jax.training.profiling import Profiler
from dsmoe_jax.training.rows import (
    RunningLoad,
    before_training,
    first_non_finite,
    mixture_row,
    shown,
    steps_of_lowest_loss,
    training_row,
    validation_row,
)
from dsmoe_jax.training.saving import SaveTimer
from dsmoe_jax.training.self_check import self_check as check_devices
from dsmoe_jax.training.spikes import Decisions, Judged
from dsmoe_jax.training.stages import StageRun, check_kernels, check_stages, kernels_of
from dsmoe_jax.training.start import TrainState, check_start_from, start, to_items
from dsmoe_jax.training.step import StepMetrics
from dsmoe_jax.training.teacher import (
    Teacher,
    check_same_teacher,
    check_teacher_on_mesh,
    load_teacher,
)


class NonFinite(ValueError):
    """The loss or the gradient of a step is not a number any more."""


@dataclass(frozen=True)
class Result:
    """Outcome of a call of `train`.

    Attributes:
      step: updates made.
      metrics: the last row of metrics.jsonl.
      evaluation: held-out results after the last step, see `HeldOut.measure`; of a run that began
        with the parameters of another one also those `before` the first step.
      resumed_from: the checkpoint that this call continued from (None: from the start).
    """

    step: int
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    resumed_from: int | None


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
      self_check: whether one tiny step is compared with the dense loop first, see self_check.py;
        None: on more than one device.

    Raises:
      ValueError: for a config, corpus or workdir that cannot be used, devices that compute
        something else than the dense loop, `NonFinite` and `Violated`.
      OSError: if the disk is full.
      Stopped: after SIGTERM or Ctrl-C; everything is saved.
    """
    config = asked = derive(config)
    _check(config)
    hosts.require_same_config(config)
    config = on_devices(config, jax.device_count())
    speaks = progress and hosts.is_first()
    line = ProgressLine(config.name, config.train.steps) if speaks else Silent()
    if config != asked:
        line.message(f"{config.name}: {fallen_back(asked, config)}")
    go_on = functools.partial(going_on.prepare, go_back=go_back)
    mesh = open_mesh(config)
    with jax.set_mesh(mesh):
        check_kernels(config)  # before anything is written
        check_teacher_on_mesh(config)
    if mesh.size > 1 if self_check is None else self_check:
        line.note("self-check")
        line.message(f"{config.name}: {check_devices(config, mesh)}")
    # The one who watches is closed last, when the workdir is free again.
    with _closing(watch), jax.set_mesh(mesh), workdirs.claim(workdir, config, go_on) as directory:
        finished = hosts.on_first(lambda: _finished(directory, config))
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
            trainer = _Trainer(config, directory, corpus, interrupts, profile, *seen_by)
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


def _check(config: Config) -> None:
    """Refuses what cannot be trained, before anything is written."""
    for stage in stages_of(config):
        make_schedule(stage.config.optimizer, config.train.scheduled_steps)
    check_stages(config)
    routing_records.check_keys(config)
    if config.train.analyse_every is not None:
        for stage in stages_of(config):
            check_routes(stage.config.model)
    check_start_from(config)
    spikes.check(config)


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


def _finished(directory: Path, config: Config) -> dict[str, Any] | None:
    """The `Result` of a run that needs no more steps; None if it does."""
    evaluation = workdirs.read_evaluation(directory, "loss", "bits_per_byte")
    steps = config.train.steps
    if evaluation is None or evaluation["step"] != steps:
        return None
    rows = read_rows(directory)
    if not rows:
        raise ValueError(
            f"{directory / workdirs.METRICS}: has no row, though {workdirs.EVALUATION} says that"
            " the run is finished; bring it back, or remove the latter to evaluate again"
        )
    return {"step": steps, "metrics": rows[-1], "evaluation": evaluation, "resumed_from": steps}


class Watch(Protocol):
    """Somebody who looks at a run, such as the writer of its page, see report/live.py."""

    def look(self, directory: Path, config: Config, rows: list[dict[str, Any]]) -> None:
        """A row was written: the last one."""

    def close(self) -> None:
        """The run has ended, well or not; its events say how."""


class _Trainer:
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
        self.config = config
        self.corpus = corpus
        self.directory = directory
        self.line = line
        self.interrupts = interrupts
        self.profile = profile
        self.journal = journal
        self.wandb = wandb
        self.watch = watch if hosts.is_first() else None
        self.profiler: Profiler | None = None
        self.recorder, self.recording = routing_records.of_run(
            config, directory, corpus.fingerprint
        )
        train = config.train
        self.checkpoints = Checkpoints(
            directory / workdirs.CHECKPOINTS, train.keep_checkpoints, train.keep_every
        )
        self.log: MetricsLog | None = None
        self.teacher: Teacher | None = None
        self.tables = OverTraining(directory / workdirs.ANALYSIS)
        self.kernels: dict[str, str] = {}  # not in the log yet
        self.running_load = RunningLoad()
        self.decisions = Decisions(config)
        self.spike: tuple[int, Judged] | None = None  # one to go back for
        self.clock = DeviceClock()
        self.vote = hosts.Vote(jax.sharding.get_mesh())
        self.save_timer = SaveTimer(train.checkpoint_share)
        self.save_asked = False  # by the first process, whose clock counts
        self.host_times = HostTimes(jax.sharding.get_mesh())

    def close(self) -> None:
        """Lets everything go; a checkpoint that is being written is finished first."""
        if self.profiler is not None:
            self.profiler.close()
        self.line.close()
        self.clock.close()
        if self.log is not None:
            self.log.close()
        self.checkpoints.close()

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
        pending: tuple[int, StepMetrics, jax.Array | int, Any] | None = None
        step = first
        while step < self.config.train.steps:
            step += 1
            if step > self.now.stage.end:
                state = self._next_stage(step, state)
            with self.host_times.spent(DATA):
                batch = self.now.next_batch(step)
            with self.profiler.step(step, state):
                state, metrics = self.now.train_step(state, batch)
            self.profiler.after(step, state)
            self.clock.dispatched(metrics.loss)
            self.host_times.step()
            if pending is not None:
                self._report(*pending)  # while the device is at work on this step
            times = self.host_times.gather() if self._logs(step) else None
            pending = (step, metrics, self._vote(), times)
            if self.spike is None and self._is_due(step):
                self._report(*pending)
                pending = None
                if self.spike is None:
                    self._settle(step, state)
            if self.spike is not None:
                state = pending = metrics = None  # the checkpoint needs their memory
                state, step = self._rewind()
        result = hosts.on_first(lambda: _finished(self.directory, self.config))
        self.journal.add(events.END, loss=result["evaluation"]["loss"])
        return Result(**result | {"resumed_from": resumed_from})

    def _stage(self, step: int, position: dict[str, Any] | None = None) -> StageRun:
        routing = self.recorder, self.recording
        stage = stage_of(self.decisions.config(), step)
        return StageRun(stage, self.corpus, position, *routing, self.teacher)

    def _next_stage(self, step: int, state: TrainState) -> TrainState:
        """Makes the stage of a step ready; its losses are compared with its own alone."""
        self.now = self._stage(step, self.now.position())
        self._name_kernels()
        self.line.note(f"compiling the training step of the stage from step {step}")
        self.clock.restart()
        self.journal.add(events.STAGE, from_step=step)
        return state._replace(spikes=self.decisions.restore(None))

    def _name_kernels(self) -> None:
        """Says which kernels the stage uses, now and in the next row."""
        self.kernels = kernels_of(self.now.stage.config)
        names = ", ".join(f"{what} {name}" for what, name in self.kernels.items())
        if names:
            self.line.message(f"{self.config.name}: kernels: {names}")

    def _start(self) -> tuple[TrainState, int, int | None]:
        """The state to go on from, its step, and the checkpoint that it came from."""
        state, step, extra = start(self.config, self.checkpoints, self.corpus)
        self.teacher = load_teacher(self.config, self.corpus)
        state = state._replace(spikes=self.decisions.restore((extra or {}).get("spikes")))
        if extra is None:
            self.now = self._stage(0)
            return state, 0, None
        check_same_teacher(self.config, self.teacher, extra.get("teacher"))
        self.now = self._stage(step, extra["data"])
        self.running_load = RunningLoad(extra["running_load"])
        self.line.message(f"{self.config.name}: going on from step {step}")
        return state, step, step

    def _vote(self) -> jax.Array | int:
        """The signal that this process was sent, and whether a checkpoint is due."""
        due = hosts.is_first() and self.save_timer.is_due()
        return self.vote(2 * self.interrupts.noted + due)

    def _hear(self, vote: jax.Array | int) -> None:
        """Acts on the vote of all processes; with a signal everything is saved anyway."""
        signum, due = divmod(int(vote), 2)
        self.interrupts.hear(signum)
        self.save_asked = self.save_asked or due == 1

    def _open_log(self, step: int) -> None:
        """Opens the log, cut off after the step that the run goes on from."""
        if hosts.is_first():
            self.log = MetricsLog(self.directory, step, self.wandb)
            self.tables.go_back(step)
        else:
            self.log = NoLog()
        self.logged_step = self.saved_step = self.journal.step = step

    def _rewind(self) -> tuple[TrainState, int]:
        """Goes back to the newest checkpoint, past the data that were read since: `spikes.py`."""
        assert self.spike is not None
        assert self.log is not None
        spiked, judged = self.spike
        self.spike = None
        self.checkpoints.wait()
        to = max(self.checkpoints.steps(), default=0)
        assert to < spiked, "a step is judged before it is saved"
        self._note_spike(spiked, judged, to_step=to)
        self.decisions.rewind(spiked, to)
        self.log.close()
        before = self.now
        self.running_load = RunningLoad()
        state, step, _ = self._start()
        if self.now.stage.first == before.stage.first:
            self.now.take_compiled(before)
        else:
            self._name_kernels()
        self._open_log(step)
        self.clock.restart()
        return state, step

    def _note_spike(self, step: int, judged: Judged, **more: Any) -> None:
        rule = self.config.train.spikes
        assert rule is not None
        found = spikes.details(step, judged) | more
        self.journal.add(events.SPIKE, action=rule.action, watch=rule.watch, **found)
        told = ", ".join(f"{key.replace('_', ' ')} {value:.5g}" for key, value in found.items())
        self.line.message(f"{self.config.name}: spike: {rule.action}: {told}")

    def _on_spike(self, step: int, judged: Judged) -> bool:
        """Does what the rule says about a spike; returns whether the step is out of the run."""
        action = self.decisions.action
        if action.rewinds:
            self.spike = step, judged
            return True
        self._note_spike(step, judged)
        if action.skips:
            self.decisions.skip(step, judged)
        return action.skips

    def _report(self, step: int, metrics: StepMetrics, vote: jax.Array | int, times: Any) -> None:
        """Waits for a step, checks it, and writes its row if it is to be logged."""
        metrics, vote, times = jax.device_get((metrics, vote, times))
        self.checkpoints.check()
        with self.host_times.spent(WORK):
            self._look(step, metrics, vote, times)

    def _look(self, step: int, metrics: StepMetrics, vote: jax.Array | int, times: Any) -> None:
        """Checks a step that has been fetched, and writes its row if it is to be logged."""
        self._hear(vote)
        judged = metrics.judged
        out = judged is not None and bool(judged.is_spike) and self._on_spike(step, judged)
        if self.spike is not None:
            return
        if not out and (found := first_non_finite(metrics)) is not None:
            raise NonFinite(self._stopped(step, "{}={}".format(*found)))
        if (broken := invariants.violation(metrics)) is not None:
            raise invariants.Violated(self._stopped(step, broken))
        self.journal.step = step
        if not out:
            self.running_load.add(metrics)
        if self.recorder is not None:
            assert metrics.router is not None
            assert metrics.recorded is not None
            self.recorder.write(routing_records.TRAIN, step, metrics.recorded)
        assert self.log is not None
        if self._logs(step):
            row = {"step": step, "tokens": tokens_after(self.config, step)}
            row |= training_row(metrics, self.now.stage.config.model)
            row |= self.running_load.row() | self._rates(step) | self.host_times.row(times)
            row |= self.decisions.row()
            row |= mixture_row(self.now.mixture, step, self.log.rows)
            if self.kernels:
                row[KERNELS], self.kernels = self.kernels, {}
            self.log.write(row)
            if self.watch is not None:
                self.watch.look(self.directory, self.config, self.log.rows)
            self.logged_step = step
        self.line.update(step, loss=f"{float(metrics.loss):.4f}", **shown(self.log.rows))

    def _rates(self, step: int) -> dict[str, Any]:
        """Speeds since the last row; no share of the peak on a machine whose peak is unknown."""
        seconds, idle = self.clock.lap()
        tokens = tokens_after(self.config, step) - tokens_after(self.config, self.logged_step)
        flops = tokens * train_flops_per_token(self.now.stage.config) / seconds
        rates: dict[str, Any] = {"tokens_per_second": tokens / seconds, "flops_per_second": flops}
        if (peak := peak_flops()) is not None:
            rates["flops_utilization"] = flops / peak
        rates["overhead"] = idle / seconds
        steps = self.clock.percentiles()
        return rates | ({"step_seconds": steps} if steps else {})

    def _logs(self, step: int) -> bool:
        """Whether a step has a row in the log."""
        asked = step == 1 or step % self.config.train.log_every == 0 or self._analyses(step)
        return asked or step == self.now.stage.end or self._evaluates(step)

    def _evaluates(self, step: int) -> bool:
        train = self.config.train
        if step == 0:  # what it begins with has been trained; a recording has no such pass
            return train.start_from is not None and self.recording is None
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def _analyses(self, step: int) -> bool:
        train = self.config.train
        if train.analyse_every is None:
            return False
        return step > 0 and (step == train.steps or step % train.analyse_every == 0)

    def _saves(self, step: int) -> bool:
        train = self.config.train
        asked = self.save_asked or self.interrupts.signum is not None
        if asked or (train.keep_best is not None and self._evaluates(step)):
            return True
        periods = (train.checkpoint_every, train.keep_every or train.checkpoint_every)
        return step == train.steps or any(step % period == 0 for period in periods)

    def _is_due(self, step: int) -> bool:
        """Whether the step must be finished, and seen to be finite, before the next one begins."""
        looks = self._evaluates(step) or self._analyses(step)
        return looks or self._saves(step) or step == self.now.stage.end

    def _settle(self, step: int, state: TrainState) -> None:
        """Saves, stops, analyses and evaluates, each if it is due and not done."""
        if self._saves(step):
            self._save(step, state)
        if self.interrupts.signum is not None:
            self._stop(step, state)
        if self._analyses(step):
            self._analyse(step, state)
        if self._evaluates(step):
            self._evaluate(step, state)

    def _save(self, step: int, state: TrainState) -> None:
        self.save_asked = False
        if step != self.saved_step:
            began = time.perf_counter()
            extra = {
                "data": self.now.position(),
                "corpus": self.corpus.fingerprint,
                "tokenizer": tokenizer_fingerprint(self.corpus.tokenizer),
                "running_load": self.running_load.saved(),
            }
            if (decided := self.decisions.saved(state.spikes)) is not None:
                extra["spikes"] = decided
            if self.teacher is not None:
                extra["teacher"] = self.teacher.identity
            self._keep_rows()  # the run may go on from here, and would not write them again
            self.checkpoints.save(step, to_items(state), extra, self._best_steps())
            self.saved_step = step
            self.save_timer.saved(time.perf_counter() - began)
            self.journal.add(events.CHECKPOINT)

    def _keep_rows(self) -> None:
        assert self.log is not None
        self.log.flush()

    def _best_steps(self) -> list[int]:
        """The steps before this one with the lowest held-out loss, as many as are to be kept."""
        assert self.log is not None
        rows = self.log.rows
        n_best = self.config.train.keep_best
        if n_best is None:
            return []
        saved = self.checkpoints.steps()
        best = hosts.on_first(lambda: steps_of_lowest_loss(rows))
        return [step for step in best if step in saved][:n_best]

    def _stop(self, step: int, state: TrainState) -> None:
        signum = self.interrupts.signum
        assert signum is not None
        self._save(step, state)
        self.checkpoints.wait()
        name = signal.Signals(signum).name
        self.line.message(
            f"{self.config.name}: stopped by {name} after step {step}, saved in {self.directory};"
            " the same command goes on from there"
        )
        self.journal.add(events.STOPPED, signal=name)
        raise Stopped(signum)

    def _analyse(self, step: int, state: TrainState) -> None:
        """Writes tables of what the experts serve, unless they are there already."""
        if hosts.on_first(lambda: step in self.tables.steps()):
            return
        self.line.note("where held-out text is routed")
        text = with_routing(
            self.corpus,
            self.now.held_out.routings(state.params, state.other),
            self.config.model.moe.n_routed_experts,
            max_tokens=over_training.TOKENS,
        )

        def write() -> None:
            assert self.log is not None
            found = self.tables.compute(step, text)
            self.log.write({"step": step, **over_training.row(found)})
            self._keep_rows()
            self.tables.finish(step, found)

        hosts.on_first(write)
        self.clock.restart()

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Measures on held-out text, unless the log has it already."""
        assert self.log is not None
        last = step == self.config.train.steps
        rows = self.log.rows
        logged = hosts.on_first(
            lambda: any(r["step"] == step and "validation_loss" in r for r in rows)
        )
        if last or not logged:
            result = self._measure(step, state)
            if not logged:
                self.log.write(validation_row(step, result))
                self.journal.add(events.EVALUATION, loss=result["loss"])
            self.clock.restart()
            if last:
                self._keep_rows()
                self.checkpoints.wait()
            if last and hosts.is_first():
                path = self.directory / workdirs.EVALUATION
                json_files.write(path, {"step": step, **result, **before_training(rows)})

    def _measure(self, step: int, state: TrainState) -> dict[str, Any]:
        def stop_if_asked(done: int) -> None:
            self.line.note(f"held-out text, {done}/{self.now.held_out.n_batches} batches")
            self._hear(self._vote())
            if self.interrupts.signum is not None:
                self._stop(step, state)

        name = routing_records.validation_name(step)
        return self.now.held_out.measure(state.params, state.other, stop_if_asked, name)

    def _stopped(self, step: int, why: str) -> str:
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        good = f"step {saved[-1]}, in {self.checkpoints.directory}" if saved else "none"
        return (
            f"step {step}: {why}; stopped. Last good checkpoint: {good}; see --help for"
            " how to go on past a spike"
        )

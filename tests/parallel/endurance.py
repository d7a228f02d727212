"""Runs that are disturbed at random moments, again and again, and end with the same numbers.

    python -m tests.parallel.endurance --kills=200
    python -m tests.parallel.endurance --kills=1000 --kinds=SIGTERM --processes=1 --places=disk
    python -m tests.parallel.endurance --preemptions=1000

A tiny model is trained by one process and by two, in a workdir on the disk and in one in a bucket
(of an emulator, its corpus too).  At a random moment (importing, compiling, training, writing a
checkpoint, evaluating) a process is killed, stopped, or finds its disk full, or the bucket goes
away: for some seconds, or for so long that the run ends with exit code 75.  Then the same command
goes on.  A run that is finished is compared with an undisturbed one: losses, gradient norms, loads,
held-out results and the parameters in the last checkpoint, bit for bit; then the next one begins.
With --preemptions one run is stopped by SIGTERM that often, in one process, which costs less.
Prints its count and the seed, and ends with exit code 1 at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of
from tests.parallel.trainers import Launcher, Run, Trainer
from tests.tools.buckets import Gateway, emulator_behind_gateway

NUMBERS = ("step", "loss", "total_loss", "grad_norm", "load", "validation_loss")
CHANGES = (
    "train.checkpoint_share=0.3",
    "train.checkpoint_every=5",
    "train.keep_checkpoints=2",
    # What would have to be compiled in addition.
    "train.record_routing=False",
    "train.analyse_every=None",
)
PATIENCE = 180.0  # seconds for a process of a run to end


class Disturbed(NamedTuple):
    """A run of which one process is in trouble, or the bucket of all."""

    run: Run
    victim: Trainer
    gateway: Gateway | None
    moment: random.Random


def sigkill(it: Disturbed) -> None:
    """Nothing is saved."""
    it.victim.send(signal.SIGKILL)


def sigterm(it: Disturbed) -> None:
    """Everything is saved, unless the process does not listen yet."""
    it.victim.send(signal.SIGTERM)


def full_disk(it: Disturbed) -> None:
    """From now on no file of this process can grow: what the kernel says of a full disk."""
    fill_disk(it.victim)


def fill_disk(victim: Trainer) -> None:
    """Lets no file of a process grow any more."""
    pid = victim.process.pid
    assert pid is not None
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))


def bucket_away(it: Disturbed) -> None:
    """Requests are cut off on their way, and new ones refused, for some seconds."""
    assert it.gateway is not None
    it.gateway.down()
    time.sleep(it.moment.uniform(0.1, 4.0))
    it.gateway.up()


def bucket_gone(it: Disturbed) -> None:
    """The same until the run has ended."""
    assert it.gateway is not None
    it.gateway.down()
    it.run.end(PATIENCE * len(it.run.trainers))
    it.gateway.up()


class Kind(NamedTuple):
    """A disturbance.

    Attributes:
      begin: makes the trouble.
      codes: with which its victim may end.
      places: where the workdir must be.
    """

    begin: Callable[[Disturbed], None]
    codes: set[int]
    places: tuple[str, ...] = ("disk", "bucket")


KINDS = {
    "SIGKILL": Kind(sigkill, {-signal.SIGKILL}),
    "SIGTERM": Kind(sigterm, {143, -signal.SIGTERM}),
    # Noticed when something is written; it may be that of stderr, too.
    "full disk": Kind(full_disk, {75, 2, 1, 120}, ("disk",)),
    "bucket away": Kind(bucket_away, {75}, ("bucket",)),
    "bucket gone": Kind(bucket_gone, {75}, ("bucket",)),
}


class Different(AssertionError):
    """A disturbed run has other numbers than the undisturbed one."""


class Place(NamedTuple):
    """Where workdirs are, and the way there.

    Attributes:
      name: "disk" or "bucket".
      directory: of the workdirs.
      changes: of the config.
      gateway: to the bucket.
    """

    name: str
    directory: Path
    changes: tuple[str, ...] = ()
    gateway: Gateway | None = None


@contextlib.contextmanager
def open_place(name: str, directory: Path, corpus: Path) -> Iterator[Place]:
    """A place for workdirs; the corpus is uploaded to a bucket.

    Args:
      name: "disk" or "bucket".
      directory: on the disk.
      corpus: a prepared one on the disk.
    """
    if name == "disk":
        yield Place(name, directory)
        return
    with emulator_behind_gateway() as (running, gateway):
        there = place_of("corpus", f"{running.address}/corpus")
        for path in corpus.iterdir():
            files.upload(there / path.name, path.read_bytes())
        runs = place_of("--workdir", f"{running.address}/runs")
        yield Place(name, runs, (f"data.corpus={there}",), gateway)


def outcome(workdir: Path) -> dict[str, Any]:
    """All that must be the same, whatever happened on the way."""
    rows = [{key: row[key] for key in NUMBERS if key in row} for row in read_rows(workdir)]
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    meta = last / "meta/metadata"
    digests = json.loads(meta.read_text())["digests"]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return {"rows": rows, "digests": digests, "evaluation": evaluation}


class Endurance:
    """Runs of one config, and how often they were disturbed.

    Args:
      launcher: of the processes.
      kinds: keys of `KINDS`.
      moment: all that is random.

    Attributes:
      counts: how often each kind happened.
      finished: runs that ended as the undisturbed one.
    """

    def __init__(self, launcher: Launcher, kinds: list[str], moment: random.Random):
        self.counts: collections.Counter[str] = collections.Counter()
        self.finished = 0
        self._launcher = launcher
        self._kinds = kinds
        self._moment = moment
        self._wanted: dict[str, Any] | None = None
        self._seconds: dict[tuple[str, int], float] = {}  # of an undisturbed run

    def leave_alone(self, place: Place, n: int) -> None:
        """Makes a run that nothing disturbs: all must be alike, wherever and by how many."""
        workdir = place.directory / f"undisturbed{n}"
        began = time.monotonic()
        self._finish(place, workdir, n)
        self._seconds[place.name, n] = time.monotonic() - began

    def disturb(self, place: Place, n: int, kills: int, on_kill: Callable[[], None]) -> None:
        """Makes a run that is disturbed until it is finished, or there were so many kills.

        Raises:
          AssertionError: if a process ends in another way than it should, or not at all.
          Different: if the run has other numbers than it should.
        """
        workdir = place.directory / f"run{self.finished}"
        while self.counts.total() < kills and not (workdir / "evaluation.json").exists():
            if kind := self._once(place, workdir, n):
                self.counts[f"{kind}, {place.name}, {n} process{'es' * (n > 1)}"] += 1
                on_kill()
        self._finish(place, workdir, n)
        self.finished += 1

    def _finish(self, place: Place, workdir: Path, n: int) -> None:
        """Brings a run to its end, and compares it with the first one."""
        if not (workdir / "evaluation.json").exists():
            codes, said = self._run(place, workdir, n).end()
            assert codes == [0] * n, said
        found = outcome(workdir)
        self._wanted = self._wanted or found
        if found != self._wanted:
            keys = [key for key in found if found[key] != self._wanted[key]]
            raise Different(f"{workdir}: {', '.join(keys)} differ from the undisturbed run's")

    def _run(self, place: Place, workdir: Path, n: int) -> Run:
        return Run(self._launcher, workdir, n, *CHANGES, *place.changes)

    def _once(self, place: Place, workdir: Path, n: int) -> str | None:
        """Starts or continues a run and disturbs it; the kind, None if it ended before."""
        kind = self._moment.choice([k for k in self._kinds if place.name in KINDS[k].places])
        began = time.monotonic()
        at = began + self._moment.uniform(0, self._seconds[place.name, n])
        run = self._run(place, workdir, n)
        victim = run.trainers[0 if "bucket" in kind else self._moment.randrange(n)]
        while time.monotonic() < at and all(t.process.is_alive() for t in run.trainers):
            time.sleep(0.01)
        happened = victim.process.is_alive()
        if happened:
            try:
                KINDS[kind].begin(Disturbed(run, victim, place.gateway, self._moment))
            except ProcessLookupError:
                happened = False
        codes, said = run.end(PATIENCE * n)
        code = codes[run.trainers.index(victim)]
        # It may have come to its end before it noticed.
        assert code in {0} | (KINDS[kind].codes if happened else set()), (kind, codes, said)
        # The others end by themselves, and a launcher starts all of them again.
        others = {None} if kind == "full disk" else {None, 2}
        assert not others & set(codes), (kind, codes, said)
        if happened:
            return kind
        # It had not far to go, or what was compiled for the first run made it quicker.
        self._seconds[place.name, n] = time.monotonic() - began
        return None


class Preempts:
    """Sends SIGTERM to this process after some rows: one who looks at a run."""

    def __init__(self, rows: int):
        self._left = rows

    def look(self, directory: Path, config: Any, rows: list[dict[str, Any]]) -> None:
        """Counts a row."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Does nothing."""


def preempt(
    config: Any, workdir: Path, times: int, moment: random.Random, on_stop: Callable[[], None]
) -> None:
    """Trains a run that is stopped after every two or three steps, until it was so often.

    Args:
      config: of the run, which logs every step and has three times as many.
      workdir: of the run.
      times: how often.
      moment: all that is random.
      on_stop: called after each.
    """
    from dsmoe_jax.training.interrupt import Stopped
    from dsmoe_jax.training.loop import train

    with compiling_once():
        for done in range(times):
            with contextlib.suppress(Stopped):
                train(config, workdir, progress=False, watch=Preempts(moment.randint(1, 2)))
                raise AssertionError(f"was not stopped for the {done + 1}th time")
            on_stop()
        train(config, workdir, progress=False)


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """The same steps of later calls are not compiled again, as those of a run that goes back."""
    from dsmoe_jax.training.stages import StageRun

    first: list[StageRun] = []
    make = StageRun.__init__

    def take(self: StageRun, *arguments: Any) -> None:
        make(self, *arguments)
        first.append(self)
        self.take_compiled(first[0])
        del first[1:]

    with mock.patch.object(StageRun, "__init__", take):
        yield


def main(argv: list[str] | None = None) -> None:
    """Prints how often runs were disturbed, and whether they ended as they should."""
    parser = argparse.ArgumentParser(
        "python -m tests.parallel.endurance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", default="1,2", help="of a run, in turn (default: 1,2)")
    parser.add_argument("--places", default="disk,bucket", help="in turn (default: disk,bucket)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    parser.add_argument("--preemptions", type=int, default=0, help="instead: of one run")
    flags = parser.parse_args(argv)
    kinds, places = flags.kinds.split(","), flags.places.split(",")
    for flag, given, known in (("kinds", kinds, {*KINDS}), ("places", places, {"disk", "bucket"})):
        if unknown := set(given) - known:
            parser.error(f"--{flag}: {unknown.pop()!r} must be one of {', '.join(sorted(known))}")
    for place in places:
        if not any(place in KINDS[kind].places for kind in kinds):
            parser.error(f"--kinds={flags.kinds}: none of them happens on --places={place}")
    seed = random.randrange(2**16) if flags.seed is None else flags.seed
    directory = Path(tempfile.mkdtemp(prefix="endurance"))
    print(f"seed {seed}, in {directory}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leaves no process behind
    corpus = directory / "corpus"
    prepare("stdlib", corpus, vocab_size=512, sequence_length=64, max_bytes_per_domain=60_000)
    began = time.monotonic()
    try:
        if flags.preemptions:
            print(_preempt(directory, corpus, flags.preemptions, random.Random(seed)))
        else:
            processes = [int(n) for n in flags.processes.split(",")]
            print(_disturb(directory, corpus, flags.kills, places, processes, kinds, seed))
    except Different as error:
        sys.exit(f"error: seed {seed}: {error}")
    disturbances = flags.preemptions or flags.kills
    print(f"{(time.monotonic() - began) / disturbances:.2f} seconds each, all runs included")


def _disturb(
    directory: Path, corpus: Path, kills: int, places: list[str], processes: list[int],
    kinds: list[str], seed: int,
) -> str:  # fmt: skip
    with contextlib.ExitStack() as opened:
        cache = {"DSMOE_CACHE": str(directory / "cache")}
        opened.enter_context(mock.patch.dict(os.environ, cache))
        there = [opened.enter_context(open_place(name, directory, corpus)) for name in places]
        launcher = Launcher(directory, corpus)
        opened.callback(launcher.clean_up)
        line = opened.enter_context(contextlib.closing(ProgressLine("endurance", kills)))
        endurance = Endurance(launcher, kinds, random.Random(seed))
        cases = [(place, n) for n in processes for place in there]
        for place, n in cases:
            endurance.leave_alone(place, n)

        def on_kill() -> None:
            line.update(endurance.counts.total(), finished=str(endurance.finished))
            counted = [f"{n} {kind}" for kind, n in sorted(endurance.counts.items())]
            (directory / "counts.txt").write_text("\n".join(counted))  # if it is ended before

        for place, n in itertools.cycle(cases):
            endurance.disturb(place, n, kills, on_kill)
            if (total := endurance.counts.total()) == kills:
                break
    listing = "\n".join(f"{n:6} {kind}" for kind, n in sorted(endurance.counts.items()))
    finished = f"{endurance.finished} runs, all as the undisturbed one"
    return f"{total} disturbances:\n{listing}\n{finished}"


def _preempt(directory: Path, corpus: Path, times: int, moment: random.Random) -> str:
    from dsmoe_jax.training.loop import train
    from tests.tools.tiny import tiny

    changes = {"data.corpus": str(corpus), "train.steps": 3 * times, "train.eval_every": None}
    config = tiny(**changes, **{"train.checkpoint_every": 1000, "train.keep_checkpoints": 2})
    train(config, directory / "undisturbed", progress=False)
    with contextlib.closing(ProgressLine("preemptions", times)) as line:
        stops = itertools.count(1)
        preempt(config, directory / "run", times, moment, lambda: line.update(next(stops)))
    if outcome(directory / "run") != outcome(directory / "undisturbed"):
        raise Different(f"{directory / 'run'} differs from the undisturbed run")
    return f"{times} preemptions of a run of {3 * times} steps, which is as the undisturbed one"


if __name__ == "__main__":
    from tests.tools import compiling

    compiling.set_flag()
    with compiling.compiling_quickly(Path(tempfile.mkdtemp(prefix="compiled"))):
        main()

"""Runs that are disturbed at random moments, again and again, and end with the same numbers.

    python -m tests.parallel.endurance --kills=200
    python -m tests.parallel.endurance --kills=1000 --kinds=SIGTERM --processes=1

A tiny model is trained by one process and by two.  At a random moment (importing, compiling,
training, writing a checkpoint, evaluating) a process is killed, stopped, or finds its disk full.
Then the same command goes on.  A run that is finished is compared with an undisturbed one: losses,
gradient norms, loads, held-out results and the parameters in the last checkpoint, bit for bit; then
the next one begins.  Prints its count and the seed, and ends with exit code 1 at the first
difference.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs.metrics_log import read_rows
from tests.parallel.trainers import Launcher, Run, Trainer

NUMBERS = ("step", "loss", "total_loss", "grad_norm", "load", "validation_loss")
CHANGES = ("train.checkpoint_share=0.3", "train.checkpoint_every=5", "train.keep_checkpoints=2")
# Seconds after which a process is in trouble, drawn evenly from 0 up: most of a run's life.
LONGEST = 14.0


def sigkill(victim: Trainer) -> None:
    """Nothing is saved."""
    victim.send(signal.SIGKILL)


def sigterm(victim: Trainer) -> None:
    """Everything is saved, unless the process does not listen yet."""
    victim.send(signal.SIGTERM)


def full_disk(victim: Trainer) -> None:
    """From now on no file of this process can grow: what the kernel says of a full disk."""
    pid = victim.process.pid
    assert pid is not None
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))


KINDS: dict[str, Callable[[Trainer], None]] = {
    "SIGKILL": sigkill,
    "SIGTERM": sigterm,
    "full disk": full_disk,
}


class Different(AssertionError):
    """A disturbed run has other numbers than the undisturbed one."""


def outcome(workdir: Path) -> dict[str, Any]:
    """All that must be the same, whatever happened on the way."""
    rows = [{key: row[key] for key in NUMBERS if key in row} for row in read_rows(workdir)]
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    meta = last / "meta/metadata"
    digests = json.loads(meta.read_text())["digests"]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return {"rows": rows, "digests": digests, "evaluation": evaluation}


def disturbed(
    launcher: Launcher, workdir: Path, n: int, kinds: list[str], moment: random.Random
) -> str | None:
    """Starts or continues a run and disturbs it once; the kind, None if it was finished before.

    Raises:
      AssertionError: if a process ends in another way than it should, or not at all.
    """
    kind, at = moment.choice(kinds), time.monotonic() + moment.uniform(0, LONGEST)
    run = Run(launcher, workdir, n, *CHANGES)
    victim = moment.choice(run.trainers)
    while time.monotonic() < at and all(t.process.is_alive() for t in run.trainers):
        time.sleep(0.01)
    happened = victim.process.is_alive()
    if happened:
        try:
            KINDS[kind](victim)
        except ProcessLookupError:
            happened = False
    codes, said = run.end(180.0 * n)
    # A full disk is noticed when something is written; it may be that of stderr, too.
    expected = {"SIGKILL": {-9}, "SIGTERM": {143, -15, 0}, "full disk": {75, 2, 0, 1, 120}}[kind]
    code = codes[run.trainers.index(victim)]
    assert code in (expected | {0} if happened else {0}), (kind, codes, said)
    assert None not in codes, (kind, codes, said)
    return kind if happened else None


def endure(
    launcher: Launcher,
    directory: Path,
    wanted: dict[str, Any],
    kills: int,
    processes: list[int],
    kinds: list[str],
    moment: random.Random,
    on_kill: Callable[[collections.Counter[str], int], None] = lambda counts, finished: None,
) -> tuple[collections.Counter[str], int]:
    """Disturbs runs until it has done so often enough, and finishes the last one.

    Args:
      launcher: of the processes.
      directory: for the workdirs.
      wanted: the `outcome` of the undisturbed run.
      kills: how many disturbances.
      processes: of a run, in turn.
      kinds: keys of `KINDS`.
      moment: all that is random.
      on_kill: called after each, with the counts and the number of finished runs.

    Returns:
      How often each kind, and how many runs were finished.

    Raises:
      Different: at the first run with other numbers.
    """
    counts: collections.Counter[str] = collections.Counter()
    finished = 0
    while True:
        n, workdir = processes[finished % len(processes)], directory / f"run{finished}"
        while not (workdir / "evaluation.json").exists():
            if counts.total() == kills:
                codes, said = Run(launcher, workdir, n, *CHANGES).end()
                assert codes == [0] * n, said
            elif kind := disturbed(launcher, workdir, n, kinds, moment):
                counts[kind] += 1
                on_kill(counts, finished)
        found = outcome(workdir)
        if found != wanted:
            keys = [key for key in wanted if found[key] != wanted[key]]
            raise Different(f"{workdir}: {', '.join(keys)} differ from the undisturbed run's")
        finished += 1
        if counts.total() == kills:
            return counts, finished


def main(argv: list[str] | None = None) -> None:
    """Prints how often runs were disturbed, and whether they ended as they should."""
    parser = argparse.ArgumentParser(
        "python -m tests.parallel.endurance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", default="1,2", help="of a run, in turn (default: 1,2)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    flags = parser.parse_args(argv)
    kinds = flags.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {unknown.pop()!r} must be one of {', '.join(KINDS)}")
    seed = random.randrange(2**16) if flags.seed is None else flags.seed
    directory = Path(tempfile.mkdtemp(prefix="endurance"))
    print(f"seed {seed}, in {directory}", flush=True)
    corpus = directory / "corpus"
    prepare("stdlib", corpus, vocab_size=512, sequence_length=64, max_bytes_per_domain=60_000)
    launcher = Launcher(directory, corpus)
    line = ProgressLine("endurance", flags.kills)
    try:
        first = Run(launcher, directory / "undisturbed", 1, *CHANGES)
        codes, said = first.end()
        assert codes == [0], said
        counts, finished = endure(
            launcher, directory, outcome(first.workdir), flags.kills,
            [int(n) for n in flags.processes.split(",")], kinds, random.Random(seed),
            lambda counts, done: line.update(counts.total(), finished=str(done)),
        )  # fmt: skip
    except Different as error:
        line.close()
        sys.exit(f"error: seed {seed}: {error}")
    finally:
        line.close()
        launcher.clean_up()
    listing = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    print(f"{counts.total()} disturbances ({listing}): {finished} runs, all as the undisturbed one")


if __name__ == "__main__":
    from tests.tools import compiling

    compiling.set_flag()
    with compiling.compiling_quickly(Path(tempfile.mkdtemp(prefix="compiled"))):
        main()

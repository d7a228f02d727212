"""Recorded routing on disk: which experts every token went to, to be replayed in another run.

    manifest.json                     model, text and sizes that the routing belongs to
    train/00000001.npz                step 1: ids_BLSK (integers, E is unassigned) and gates_BLSK
                                      (float32)
    validation-00000010/00000001.npz  the first held-out batch after step 10, the same arrays

It is the routing that the experts computed: after dropping.  A batch in which something was dropped
has `sent_BLSK` too, the experts before; one in which the router itself left something out has
`chosen_BLSK`, all that it chose.  (See `RecordedRouting`.)

Shapes: B sequences of a batch, L MoE layers, S positions, E experts that the router chooses among
(identity experts last), K columns of a routing.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.config import Config, replace, stage_of, stages_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.routers import Router, get_router
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.workdir import ROUTING
from dsmoe_jax.storage import files
from dsmoe_jax.storage.away import Away
from dsmoe_jax.storage.places import place_of

MANIFEST = "manifest.json"
TRAIN = "train"


def router_of(config: Config) -> Router | None:
    """The registry line of the router of a config; None without routed experts."""
    moe = config.model.moe
    return get_router(moe)[0] if moe.n_routed_experts else None


def needs(config: Config) -> str:
    """The recording that the router of a config needs: "", "ids" or "routing", see `Router`."""
    router = router_of(config)
    return "" if router is None else router.needs_recording


def check_keys(config: Config) -> None:
    """Refuses a recording that no router replays, and a router that replays without a recording.

    Raises:
      ValueError: naming the key.
    """
    train = config.train
    stages = [stage.config for stage in stages_of(config)]
    replaying = [stage for stage in stages if needs(stage)]
    name = (replaying or stages)[0].model.moe.router.name
    want = "needs the WORKDIR/routing of a run" if replaying else "replays nothing"
    require(
        bool(replaying) == (train.replay_routing is not None),
        "train.replay_routing",
        train.replay_routing,
        f"model.moe.router.name={name!r} {want}",
    )
    require(
        not train.record_routing or config.model.moe.n_routed_experts > 0,
        "train.record_routing",
        train.record_routing,
        "there are no routed experts; must be False",
    )


def belongs_to(config: Config, fingerprint: str) -> dict[str, Any]:
    """Properties that a recording must have in common with the run that replays it.

    Args:
      config: of the run.
      fingerprint: of the corpus.
    """
    model = config.model
    # How fast it learns does not matter; what is learned from does.
    stages = stages_of(replace(config, **{"optimizer.rate_changes": ()}))
    return {
        "layers": len(model.moe_layers),
        # In training those of multi-token prediction come behind them.
        "mtp_layers": model.mtp_depth or None,
        "experts": model.moe.n_choices,
        "experts_per_token": [_columns(stage.config) for stage in stages],
        "stages_after": [stage.first for stage in stages],  # updates made before each stage
        "sequence_length": config.data.sequence_length,
        "corpus": fingerprint,
        "seed": config.train.seed,
        "skip_batches": [list(pair) for pair in config.train.skip_batches] or None,
    }


def _columns(config: Config) -> int:
    """K of a recording."""
    moe = config.model.moe
    router = router_of(config)
    assert router is not None, "a model without routed experts has no recording"
    return router.columns(moe.n_choices, moe.num_experts_per_tok)


def validation_name(step: int) -> str:
    """Name of the pass over the held-out batches after a step."""
    return f"validation-{step:08}"


class Recorder:
    """Writes a recording; a batch that is written again (by a run that goes on) replaces the old.

    Every process has the routing of the whole batch; the first one writes.

    Args:
      directory: created if missing.
      belongs: from `belongs_to`.
    """

    def __init__(self, directory: Path, belongs: dict[str, Any]):
        self.directory = directory
        if hosts.is_first():
            directory.mkdir(parents=True, exist_ok=True)
            json_files.write(directory / MANIFEST, belongs)

    def write(self, name: str, number: int, routing: RecordedRouting) -> None:
        """Adds a batch.

        Args:
          name: of the pass: "train", or from `validation_name`.
          number: of the step or batch, from 1.
          routing: (L, B, S, K).
        """
        if not hosts.is_first():
            return
        ids, gates, sent, chosen = (np.swapaxes(np.asarray(x), 0, 1) for x in routing)
        small = np.int16 if max(ids.max(), chosen.max()) < 2**15 else np.int32
        arrays = {"ids_BLSK": ids.astype(small), "gates_BLSK": gates}
        if (sent != ids).any():
            arrays["sent_BLSK"] = sent.astype(small)
        if (chosen != sent).any():
            arrays["chosen_BLSK"] = chosen.astype(small)
        path = _path(self.directory, name, number)
        path.parent.mkdir(exist_ok=True)
        with files.replacing(path) as file:
            np.savez(file, **arrays)


class Recording:
    """Reads a recording.

    Args:
      key: how the user names it, with its value, for errors.
      directory: of a `Recorder`.
      wanted: entries of `belongs_to` that its manifest must have.
      columns: every K that a batch may have.
      all_choices: whether those must be known that were left out or dropped.

    Raises:
      ValueError: with the numbers, if it is of other sizes or data.
    """

    def __init__(
        self,
        key: str,
        directory: Path,
        wanted: dict[str, Any],
        columns: list[int],
        *,
        all_choices: bool = False,
    ):
        self.directory = directory
        self._key = key
        self._all_choices = all_choices
        path = directory / MANIFEST
        if not path.is_file():
            raise ValueError(f"{key}: no recorded routing there (no {MANIFEST})")
        damaged = f"{key}: {path} is damaged: not the manifest of a recording"
        found = json_files.parse(path.read_bytes(), damaged)
        wrong = [f"{k}={found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v]
        if wrong:
            raise ValueError(f"{key}: recorded with {'; '.join(wrong)}")
        self._layers = wanted["layers"]
        self._mtp_layers = wanted.get("mtp_layers") or 0
        self._n_experts = wanted["experts"]
        self._shapes_SK = [(wanted["sequence_length"], k) for k in dict.fromkeys(columns)]

    def check_run(self, config: Config) -> None:
        """Looks for the batches of all steps of a run.

        Raises:
          ValueError: with the numbers, if there are too few, or of another size.
        """
        steps = config.train.steps
        replaying = [stage for stage in stages_of(config) if needs(stage.config)]
        for stage in replaying:
            for step in range(stage.first + 1, stage.end + 1):
                if not _path(self.directory, TRAIN, step).is_file():
                    raise ValueError(
                        f"{self._key}: there is no step {step}, train.steps={steps} must be at most"
                        f" {step - 1}"
                    )
            self.read(TRAIN, stage.first + 1, stage.config.train.global_batch_size)
        every = config.train.eval_every or steps
        for step in {*range(every, steps, every), steps}:
            in_force = stage_of(config, step).config
            if needs(in_force) == "routing":  # the other routers choose by themselves in evaluation
                micro_batch = in_force.train.global_batch_size // in_force.train.accumulation_steps
                self.read(validation_name(step), 1, micro_batch)

    def read(
        self, name: str, number: int, batch_size: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays to add to a batch: `replayed_NAME_BLSK` for each NAME of `RecordedRouting`.

        Args:
          name, number: as for `Recorder.write`.
          batch_size: sequences that the batch must have.
          rows: the ones to return; None is all.

        Raises:
          ValueError: if there is no such batch, it is of another shape, or lacks choices.
        """
        path = _path(self.directory, name, number)
        if not path.is_file():
            raise ValueError(f"{self._key}: holds no batch {number} of {name}")
        routing = load(path)
        if len(routing.ids) != batch_size:
            raise ValueError(
                f"{self._key}: {name} has batches of {len(routing.ids)} sequences, not {batch_size}"
            )
        layers = self._layers + (self._mtp_layers if name == TRAIN else 0)
        wanted = [(batch_size, layers, *shape) for shape in self._shapes_SK]
        shapes = dict.fromkeys(x.shape for x in routing)
        if len(shapes) > 1 or routing.ids.shape not in wanted:
            raise ValueError(
                f"{self._key}: {path.relative_to(self.directory)} has ids of shape"
                f" {routing.ids.shape} and gates of {routing.gates.shape}, not"
                f" {' or '.join(map(str, wanted))}"
            )
        # Modules of multi-token prediction route nothing at the ends of documents.
        own = np.asarray(routing.chosen)[:, : self._layers]
        if self._all_choices and _has_holes(own, self._n_experts):
            raise ValueError(
                f"{self._key}: {path.relative_to(self.directory)} lacks choices that were dropped"
                " or left out, on which gates and balance terms depend; record the run anew, or"
                " replay its gates too (the router 'replay')"
            )
        rows = range(batch_size) if rows is None else rows
        return {f"replayed_{k}_BLSK": x[list(rows)] for k, x in routing._asdict().items()}

    def batches(self, name: str) -> Iterator[RecordedRouting]:
        """The batches of a pass in their order, (L, B, S, K).

        Raises:
          ValueError: as `read`.
        """
        first = load(_path(self.directory, name, 1))
        for number in itertools.count(1):
            path = _path(self.directory, name, number)
            if not path.is_file():
                return
            self.read(name, number, len(first.ids))  # refuses a batch of other sizes
            yield RecordedRouting(*(x.swapaxes(0, 1) for x in load(path)))


def _has_holes(ids_BLSK: np.ndarray, n_experts: int) -> bool:
    """Whether assignments are missing other than by padding, which ends a sequence."""
    missing_BLSK = ids_BLSK == n_experts
    padding_BS = missing_BLSK.all(axis=(1, 3))
    padding_BS = np.logical_and.accumulate(padding_BS[:, ::-1], axis=1)[:, ::-1]
    return bool((missing_BLSK & ~padding_BS[:, None, :, None]).any())


def load(path: Path) -> RecordedRouting:
    """A batch as it was written, (B, L, S, K): all ids int32.

    `sent` is `ids` where nothing else was written, and `chosen` is `sent`.

    Raises:
      ValueError: naming the file, if it is none.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # numpy leaves a damaged one open
            ids = arrays["ids_BLSK"].astype(np.int32)
            sent = arrays["sent_BLSK"].astype(np.int32) if "sent_BLSK" in arrays else ids
            chosen = arrays["chosen_BLSK"].astype(np.int32) if "chosen_BLSK" in arrays else sent
            return RecordedRouting(ids, arrays["gates_BLSK"], sent, chosen)
    except Away:
        raise
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path}: cannot be read, or is not a batch of recorded routing") from None


def of_run(
    config: Config, workdir: Path, fingerprint: str
) -> tuple[Recorder | None, Recording | None]:
    """The recorder and the recording of a training run, each if it has one.

    Raises:
      ValueError: for a recording that cannot be replayed.
    """
    recorder = recording = None
    if config.train.record_routing:
        recorder = Recorder(workdir / ROUTING, belongs_to(config, fingerprint))
    if config.train.replay_routing is not None:
        recording = for_run(config, fingerprint)
    return recorder, recording


def for_run(config: Config, fingerprint: str) -> Recording:
    """The recording of `train.replay_routing`.

    Raises:
      ValueError: if it is of another model, text or order of the text, or has too few steps.
    """
    folder = config.train.replay_routing
    assert folder is not None, "see `check_keys`"
    wanted = belongs_to(config, fingerprint)
    key = f"train.replay_routing={folder!r}"
    recording = Recording(
        key,
        place_of("train.replay_routing", folder),
        wanted,
        wanted["experts_per_token"],
        all_choices=any(needs(stage.config) == "ids" for stage in stages_of(config)),
    )
    recording.check_run(config)
    return recording


def for_held_out(config: Config, fingerprint: str) -> Recording | None:
    """The recording of a run that cannot route held-out text by itself; None if it can."""
    return for_run(config, fingerprint) if needs(config) == "routing" else None


def of_held_out(folder: str, config: Config, fingerprint: str) -> tuple[Recording, str]:
    """One recorded pass over the held-out text, to be replayed by a model of any router.

    Args:
      folder: that of the pass, ROUTING/validation-00000400.
      config: of the model.
      fingerprint: of its corpus.

    Returns:
      The recording, and the name of the pass in it.

    Raises:
      ValueError: if it is of another size or text, or no such pass.
    """
    key = f"--replay_routing={folder}"
    path = place_of("--replay_routing", folder)
    belongs = belongs_to(config, fingerprint)
    wanted = {k: belongs[k] for k in ("layers", "experts", "sequence_length", "corpus")}
    recording = Recording(key, path.parent, wanted, belongs["experts_per_token"])
    if not _path(path.parent, path.name, 1).is_file() or path.name == TRAIN:
        raise ValueError(f"{key}: holds no held-out batches; name a folder validation-...")
    return recording, path.name


def _path(directory: Path, name: str, number: int) -> Path:
    return directory / name / f"{number:08}.npz"

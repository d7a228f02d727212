r"""Measures a trained run on held-out text: nats per token and bits per byte, by domain.

python -m dsmoe_jax evaluate --workdir=runs/dsmoe
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=200 --max_batches=10 --json
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --corpus=my_texts/ --out=my_texts.json

--corpus measures on other text, in the tokens of the run: on all of one's own text (a file, or a
folder whose subfolders are the domains), on the held-out part of a prepared or built-in corpus.
Bits per byte compare between texts of one model and between models, whatever their tokenizers.
Nothing in the workdir changes: evaluation.json stays that of the run's own held-out text.

Where a model drops tokens in evaluation, or a batch's tokens compete for experts, the loss depends
on --batch_size; the result names it then.

The routing can be recorded, and replayed with the experts of another step or run:

python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=400 --record_routing=routing
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=200 \
    --replay_routing=routing/validation-00000400
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from flax import nnx

from dsmoe_jax.commands import command_line, text_flags
from dsmoe_jax.commands.text_flags import CORPUS, opened
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.moe import dropping
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.report.text import held_out_text
from dsmoe_jax.runs import json_files, routing_records
from dsmoe_jax.runs.loading import Run, Writer

command_line.define_mesh()
flags.adopt_module_key_flags(text_flags)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at once.", lower_bound=1)
_MAX_BATCHES = flags.DEFINE_integer("max_batches", 0, "Stop early; 0 is all.", lower_bound=0)
_RECORD_ROUTING = flags.DEFINE_string(
    "record_routing", None, "Write which experts every token went to in this new directory."
)
_REPLAY_ROUTING = flags.DEFINE_string(
    "replay_routing", None, "Take the recorded routing of this folder, DIRECTORY/validation-..."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_OUT = flags.DEFINE_string("out", None, "Also write the JSON to this new file.")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    out = _new_file(_OUT.value)
    with jax.set_mesh(command_line.mesh()):
        run, corpus = opened(_WORKDIR.value, _STEP.value)
        tokens = _BATCH_SIZE.value * run.config.data.sequence_length
        dropping.check_capacity(run.config.model.moe, tokens)
        graph, params, other = nnx.split(run.model, nnx.Param, ...)
        recorder, replayed, name = _routing(run, corpus)
        held_out = HeldOut(graph, corpus, _BATCH_SIZE.value, _MAX_BATCHES.value, recorder, replayed)
        line = ProgressLine(run.config.name, held_out.n_batches)
        result = {"step": run.step} | held_out.measure(params, other, line.update, name)
    line.close()
    if CORPUS.value is not None:
        result["corpus"] = CORPUS.value
        result["corpus_fingerprint"] = corpus.fingerprint
    if out is not None:
        json_files.write(out, result)
    print(json_files.dumps(result) if _JSON.value else held_out_text(result))


def _new_file(name: str | None) -> Path | None:
    """The file of `--out`; refuses one that exists, before anything is measured."""
    if name is None:
        return None
    path = local_path("--out", name)
    if path.exists() or not path.parent.is_dir():
        wrong = "exists already" if path.exists() else f"there is no folder {path.parent}"
        raise ValueError(f"--out={name}: {wrong}; name a new file")
    return path


def _routing(
    run: Run | Writer, corpus: Corpus
) -> tuple[routing_records.Recorder | None, routing_records.Recording | None, str]:
    """Recorder of the routing, recording to replay, and the name of this pass in both."""
    directory = _RECORD_ROUTING.value
    folder = _REPLAY_ROUTING.value
    fingerprint = corpus.fingerprint
    if directory and folder:
        raise ValueError("--record_routing: it would be what --replay_routing says; give only one")
    if CORPUS.value is not None and (directory or folder or run.config.train.replay_routing):
        raise ValueError(
            f"--corpus={CORPUS.value}: routing is recorded and replayed on the run's own text"
        )
    if folder:
        config = stage_of(run.config, run.step).config
        return None, *routing_records.of_held_out(folder, config, fingerprint)
    recorder = None
    if directory:
        path = local_path("--record_routing", directory)
        if path.exists():
            raise ValueError(f"--record_routing={path}: exists already; name a new directory")
        belongs = routing_records.belongs_to(run.config, fingerprint)
        recorder = routing_records.Recorder(path, belongs)
    replayed = routing_records.for_held_out(run.config, fingerprint)
    return recorder, replayed, routing_records.validation_name(run.step)

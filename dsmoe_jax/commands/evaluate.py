r"""Measures a trained run: on held-out text, or by the questions that it answers.

Held-out text gives nats per token and bits per byte, by domain:

python -m dsmoe_jax evaluate --workdir=runs/dsmoe
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=200 --max_batches=10 --json
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --corpus=my_texts/ --out=my_texts.json

--corpus measures on other text, in the tokens of the run: on all of one's own text (a file, or a
folder whose subfolders are the domains), on the held-out part of a prepared or built-in corpus.
Bits per byte compare between texts of one model and between models, whatever their tokenizers.
Nothing in the workdir changes: evaluation.json stays that of the run's own held-out text.

A model whose router chooses experts by task takes a domain's name for its task.  Text with other
domains, and questions, need --as_task.

Where a model drops tokens in evaluation, or a batch's tokens compete for experts, the loss depends
on --batch_size; the result names it then.

The routing can be recorded, and replayed with the experts of another step or run:

python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=400 --record_routing=routing
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --step=200 \
    --replay_routing=routing/validation-00000400

--tasks asks questions with known answers instead, of several runs side by side if wanted.  Each
possible answer gets its log-likelihood after the question, and the likeliest one is taken:

python -m dsmoe_jax evaluate --workdir=runs/dsmoe --tasks=piqa,sciq --limit=200
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --workdir=runs/gshard --tasks=arc_easy --shots=5
python -m dsmoe_jax evaluate --workdir=runs/dsmoe --tasks=own.jsonl --shots=2 --out=own.json

A task is one of the sets that the field uses (named at the flag below; 86 MB are downloaded once),
or a file of one's own with a question on each line, all of them with choices or all without:

    {"context": "Question: 2 + 3?\nAnswer:", "choices": [" 4", " 5"], "label": 1}
    {"context": "The capital of France is", "answer": " Paris"}

--shots puts answered questions before each one: examples that come with a set, the first rows of a
file.  docs/downstream.md says what the numbers mean.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from dsmoe_jax.commands import command_line, text_flags
from dsmoe_jax.commands.text_flags import CORPUS, opened
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.evaluation.downstream import TokenisedSets
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.evaluation.likelihood import Scorer
from dsmoe_jax.evaluation.question_sets import QUESTION_SETS, read_task
from dsmoe_jax.evaluation.questions import QuestionSet
from dsmoe_jax.model.generation import routing_notes
from dsmoe_jax.moe import dropping
from dsmoe_jax.moe.routers import task_number
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.report.downstream_table import downstream_text
from dsmoe_jax.report.names import telling_apart
from dsmoe_jax.report.text import held_out_text
from dsmoe_jax.runs import json_files, routing_records
from dsmoe_jax.runs.loading import Run, Writer, load_writer
from dsmoe_jax.runs.workdir import read_config

command_line.define_mesh()
flags.adopt_module_key_flags(text_flags)
_WORKDIR = flags.DEFINE_multi_string(
    "workdir", [], "Directory of the run; with --tasks it may be repeated."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at once.", lower_bound=1)
_MAX_BATCHES = flags.DEFINE_integer("max_batches", 0, "Stop early; 0 is all.", lower_bound=0)
_RECORD_ROUTING = flags.DEFINE_string(
    "record_routing", None, "Write which experts every token went to in this new directory."
)
_REPLAY_ROUTING = flags.DEFINE_string(
    "replay_routing", None, "Take the recorded routing of this folder, DIRECTORY/validation-..."
)
_TASKS = flags.DEFINE_list(
    "tasks",
    None,
    "Question sets or files of questions, with commas between; the sets are"
    f" {', '.join(QUESTION_SETS)}.",
)
_SHOTS = flags.DEFINE_integer(
    "shots", None, "Answered questions before each one; as few as there can be if not given.",
    lower_bound=0,
)  # fmt: skip
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Ask only this many questions of each task, the first ones.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Tokens that a model reads at once, the last ones of a question and its answer;"
    " data.sequence_length of the run if not given.",
    lower_bound=1,
)
_AS_TASK = flags.DEFINE_string(
    "as_task",
    None,
    "Task that all text is taken to be of, by a model whose router chooses experts by task; without"
    " it a domain's name says its task.",
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_OUT = flags.DEFINE_string("out", None, "Also write the JSON to this new file.")

# Flags of one kind of measurement only.
_OF_TEXT = ("corpus", "rows", "moved_corpus", "max_batches", "record_routing", "replay_routing")
_OF_TASKS = ("shots", "limit", "max_length")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    tasks = _TASKS.value
    _refuse_flags(tasks)
    out = _new_file(_OUT.value)
    result, text = _measure() if tasks is None else _ask(tasks)
    if out is not None:
        json_files.write(out, result)
    print(json_files.dumps(result) if _JSON.value else text)


def _refuse_flags(tasks: list[str] | None) -> None:
    """Refuses flags of the other kind of measurement, which would be ignored."""
    names, whose = _OF_TASKS, "questions, which --tasks names"
    if tasks is not None:
        names, whose = _OF_TEXT, "held-out text; must be left out with --tasks"
    for name in names:
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name}: is for {whose}")


def _measure() -> tuple[dict[str, Any], str]:
    """Numbers of the held-out text, as JSON and for a terminal."""
    workdir, *more = _WORKDIR.value
    if more:
        raise ValueError(f"--workdir={more[0]}: a second run is for --tasks; give only one")
    with jax.set_mesh(command_line.mesh()):
        run, corpus = opened(workdir, _STEP.value)
        tokens = _BATCH_SIZE.value * run.config.data.sequence_length
        dropping.check_capacity(run.config.model.moe, tokens)
        graph, params, other = nnx.split(run.model, nnx.Param, ...)
        recorder, replayed, name = _routing(run, corpus)
        held_out = HeldOut(
            graph,
            corpus,
            _BATCH_SIZE.value,
            _MAX_BATCHES.value,
            recorder,
            replayed,
            tasks=run.model.config.moe.router.tasks,
            all_of=_task(run),
        )
        line = ProgressLine(run.config.name, held_out.n_batches)
        result = {"step": run.step} | held_out.measure(params, other, line.update, name)
    line.close()
    if CORPUS.value is not None:
        result["corpus"] = CORPUS.value
        result["corpus_fingerprint"] = corpus.fingerprint
    return result, held_out_text(result)


def _task(run: Run | Writer) -> int | None:
    """The number of the task that all text is of; None: its domains say it."""
    if _AS_TASK.value is None:
        return None
    return task_number(run.model.config.moe, _AS_TASK.value, "--as_task")


def _ask(tasks: list[str]) -> tuple[dict[str, Any], str]:
    """Numbers of the tasks for each run, as JSON and for a terminal."""
    require(bool(tasks), "--tasks", "", "must name a question set or a file")
    workdirs = dict(zip(telling_apart(_WORKDIR.value), _WORKDIR.value, strict=True))
    for workdir in workdirs.values():  # before the first run is measured
        read_config(workdir)
    sets = {name: read_task(name, _SHOTS.value, _LIMIT.value) for name in tasks}
    with jax.set_mesh(command_line.mesh()):
        runs = {name: _asked(name, workdir, sets) for name, workdir in workdirs.items()}
    return {"runs": runs}, downstream_text(runs)


def _asked(name: str, workdir: str, sets: dict[str, QuestionSet]) -> dict[str, Any]:
    """The numbers of a run."""
    run = load_writer(workdir, _STEP.value)
    task_number(run.model.config.moe, _AS_TASK.value, "--as_task")
    length = _MAX_LENGTH.value or run.config.data.sequence_length
    for note in routing_notes(run.config.model.moe):
        print(note, file=sys.stderr)
    tasks = TokenisedSets(run.tokenizer, sets, length)
    line = ProgressLine(name, tasks.n_windows)
    scorer = Scorer(run.model, length, _BATCH_SIZE.value, _AS_TASK.value)
    found = tasks.measure(scorer, line.update)
    line.close()
    return {"step": run.step, "max_length": length, "tasks": found}


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

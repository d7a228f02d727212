r"""Looks inside trained models: what each expert serves, who works together, who is alike.

python -m dsmoe_jax analyse --workdir=runs/dsmoe --to=looked
python -m dsmoe_jax analyse --workdir=runs/dsmoe --workdir=runs/gshard --to=looked

Runs the held-out text through each model and writes into the new folder --to:

    analysis.json        all tables, by run
    report.html          the tables and pictures, the runs side by side; opens without a network
    NAME.html            the routing explorer of each run: text coloured by expert, layer by layer
    side_by_side.html    of several runs: the explorer of all, on the same text

Earlier checkpoints that the workdir still holds show how the router settled, and so do the tables
of train.analyse_every.  The runs must have the same held-out text.  Dropping and competing tokens
do as in evaluation.

--corpus looks at other text, as evaluate does; a model that was converted from Hugging Face has no
text of its own.  --without_shared looks at each model a second time, with its shared experts left
out.  --replay_routing takes a recorded pass over the held-out text instead of a run's own:

python -m dsmoe_jax analyse --workdir=runs/dsmoe --to=looked \
    --replay_routing=runs/dsmoe/routing/validation-00000400
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dsmoe_jax.analysis import tables
from dsmoe_jax.analysis.over_training import OverTraining
from dsmoe_jax.analysis.routed_text import (
    RoutedText,
    check_routes,
    layer_weights,
    route_text,
    with_routing,
)
from dsmoe_jax.commands import command_line, text_flags
from dsmoe_jax.commands.text_flags import CORPUS, opened
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.report import analysis_page, explorer
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.names import telling_apart
from dsmoe_jax.runs import json_files, routing_records
from dsmoe_jax.runs.loading import Run, Writer, saved_checkpoints
from dsmoe_jax.runs.workdir import ANALYSIS
from dsmoe_jax.storage.places import place_of

command_line.define_mesh()
flags.adopt_module_key_flags(text_flags)
_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
_TO = flags.DEFINE_string("to", None, "New folder for the results.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 32_768, "Held-out tokens to look at.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at once.", lower_bound=1)
_WITHOUT_SHARED = flags.DEFINE_bool(
    "without_shared", False, "Also look at each model with its shared experts left out."
)
_REPLAY_ROUTING = flags.DEFINE_string(
    "replay_routing", None, "Look at the recorded routing of this folder, DIRECTORY/validation-..."
)
_JSON = flags.DEFINE_bool("json", False, "Also print analysis.json.")
SIDE_BY_SIDE = "side_by_side.html"


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value or not _TO.value:
        raise ValueError("--workdir, --to: both are needed, for example --to=looked")
    to = local_path("--to", _TO.value)
    if to.exists():
        raise ValueError(f"--to={_TO.value}: exists already; name a new folder")
    if _REPLAY_ROUTING.value and (len(_WORKDIR.value) > 1 or CORPUS.value):
        raise ValueError("--replay_routing: is of one run and its own text; give one --workdir")
    names = dict(zip(telling_apart(_WORKDIR.value), _WORKDIR.value, strict=True))
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with jax.set_mesh(command_line.mesh()):
            found = _analyse(names, partial)
        json_files.write(partial / "analysis.json", found)
        files = {name: f"{name}.html" for name in found}
        several = SIDE_BY_SIDE if len(found) > 1 else None
        blocks = analysis_page.blocks(found, _command(), files, several)
        (partial / "report.html").write_text(to_html("What the experts learned", blocks), "utf-8")
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(json_files.dumps(found) if _JSON.value else to / "report.html")


def _analyse(names: dict[str, str], to: Path) -> dict[str, tables.Tables]:
    """The tables of every run; writes its explorer."""
    found = {}
    texts: dict[str, RoutedText] = {}
    for name, workdir in names.items():
        run, corpus = opened(workdir)
        check_routes(run.model.config)
        text = _recorded(run, corpus) if _REPLAY_ROUTING.value else _routed(name, run, corpus)
        first = next(iter(texts.values()), text)
        if not np.array_equal(first.token_ids_T, text.token_ids_T):
            raise ValueError(
                f"--workdir={workdir}: has another held-out text than the first run; analyse them"
                " apart"
            )
        others = _earlier(workdir, run.step)
        subjects = {name: tables.Subject(text, layer_weights(run.model, corpus), others)}
        if _WITHOUT_SHARED.value and run.model.config.moe.n_shared_experts:
            part = _routed(
                f"{name}-without-shared", run, corpus, Intervention(shared_experts=False)
            )
            others = {"with shared experts": text.ids_LTK}
            subjects[f"{name}-without-shared"] = tables.Subject(part, others=others)
        for name, subject in subjects.items():
            found[name] = tables.compute(subject)
            texts[name] = subject.text
            page = explorer.to_html(f"Routing of {name}", {name: subject.text}, corpus.tokenizer)
            (to / f"{name}.html").write_text(page, encoding="utf-8")
    if len(texts) > 1:
        page = explorer.to_html("Routing side by side", texts, corpus.tokenizer)
        (to / SIDE_BY_SIDE).write_text(page, encoding="utf-8")
    return found


def _recorded(run: Run | Writer, corpus: Corpus) -> RoutedText:
    """A pass that was recorded, of the same sizes and text."""
    config = stage_of(run.config, run.step).config
    folder = str(_REPLAY_ROUTING.value)
    recording, name = routing_records.of_held_out(folder, config, corpus.fingerprint)
    n_experts = config.model.moe.n_routed_experts
    return with_routing(corpus, recording.batches(name), n_experts, max_tokens=_MAX_TOKENS.value)


def _earlier(workdir: str, last: int) -> dict[str, np.ndarray]:
    """Routing of the same text at steps before the last, ids_LTK by name of the step."""
    with saved_checkpoints(workdir) as checkpoints:
        steps = [step for step in checkpoints.steps() if step < last]
    found = {step: _routed(f"step {step}", *opened(workdir, step)).ids_LTK for step in steps}
    if CORPUS.value is None:
        while_training = OverTraining(place_of("--workdir", workdir) / ANALYSIS)
        more = [step for step in while_training.steps() if step < last and step not in found]
        found |= {step: while_training.ids(step) for step in more}
    return {f"step {step}": found[step] for step in sorted(found)}


def _routed(
    name: str,
    run: Run | Writer,
    corpus: Corpus,
    intervention: Intervention = interventions.NONE,
) -> RoutedText:
    line = ProgressLine(name, _MAX_TOKENS.value)
    text = route_text(
        run.model,
        corpus,
        max_tokens=_MAX_TOKENS.value,
        batch_size=_BATCH_SIZE.value,
        intervention=intervention,
        on_batch=lambda tokens: line.update(min(tokens, _MAX_TOKENS.value)),
    )
    line.close()
    return text


def _command() -> str:
    flags_given = [f"--workdir={workdir}" for workdir in _WORKDIR.value]
    flags_given += [f"--to={_TO.value}", f"--max_tokens={_MAX_TOKENS.value}"]
    if CORPUS.value is not None:
        flags_given.append(f"--corpus={CORPUS.value}")
    if _WITHOUT_SHARED.value:
        flags_given.append("--without_shared")
    if _REPLAY_ROUTING.value is not None:
        flags_given.append(f"--replay_routing={_REPLAY_ROUTING.value}")
    return f"python -m dsmoe_jax analyse {shlex.join(flags_given)}"

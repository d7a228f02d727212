r"""Looks inside trained models: what each expert serves, who works together, who is alike.

python -m dsmoe_jax analyse --workdir=runs/dsmoe --to=looked
python -m dsmoe_jax analyse --workdir=runs/dsmoe --workdir=runs/gshard --to=looked

Runs the held-out text through each model and writes into the new folder --to:

    analysis.json    all tables, by run
    report.html      the tables and pictures, the runs side by side; opens without a network
    NAME.html        the routing explorer of each run: text coloured by expert, layer by layer

Earlier checkpoints that the workdir still holds show how the router settled. The runs must have
the same held-out text. Dropping and competing tokens do as in evaluation.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dsmoe_jax.analysis import tables
from dsmoe_jax.analysis.routed_text import RoutedText, layer_weights, route_text
from dsmoe_jax.commands import command_line
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.report import analysis_page, explorer
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.names import telling_apart
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.loading import Run, load_run, saved_checkpoints

command_line.define_mesh()
_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
_TO = flags.DEFINE_string("to", None, "New folder for the results.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 32_768, "Held-out tokens to look at, in whole batches.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at once.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Also print analysis.json.")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value or not _TO.value:
        raise ValueError("--workdir, --to: both are needed, for example --to=looked")
    to = local_path("--to", _TO.value)
    if to.exists():
        raise ValueError(f"--to={_TO.value}: exists already; name a new folder")
    names = dict(zip(telling_apart(_WORKDIR.value), _WORKDIR.value, strict=True))
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with jax.set_mesh(command_line.mesh()):
            found = _analyse(names, partial)
        json_files.write(partial / "analysis.json", found)
        files = {name: f"{name}.html" for name in names}
        blocks = analysis_page.blocks(found, _command(), files)
        (partial / "report.html").write_text(to_html("What the experts learned", blocks), "utf-8")
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(json_files.dumps(found) if _JSON.value else to / "report.html")


def _analyse(names: dict[str, str], to: Path) -> dict[str, tables.Tables]:
    """The tables of every run; writes its explorer."""
    found = {}
    first: RoutedText | None = None
    for name, workdir in names.items():
        run = load_run(workdir)
        text = _routed(name, run)
        if first is None:
            first = text
        elif not np.array_equal(first.token_ids_T, text.token_ids_T):
            raise ValueError(
                f"--workdir={workdir}: has another held-out text than the first run; analyse them"
                " apart"
            )
        subject = tables.Subject(text, layer_weights(run.model, run.corpus), _earlier(workdir, run))
        found[name] = tables.compute(subject)
        page = explorer.to_html(f"Routing of {name}", text, run.corpus.tokenizer)
        (to / f"{name}.html").write_text(page, encoding="utf-8")
    return found


def _earlier(workdir: str, run: Run) -> dict[int, RoutedText]:
    """Routing of the same text by the checkpoints before the last, by step."""
    with saved_checkpoints(workdir) as checkpoints:
        steps = [step for step in checkpoints.steps() if step < run.step]
    return {step: _routed(f"step {step}", load_run(workdir, step)) for step in steps}


def _routed(name: str, run: Run) -> RoutedText:
    line = ProgressLine(name, _MAX_TOKENS.value)
    text = route_text(
        run.model,
        run.corpus,
        max_tokens=_MAX_TOKENS.value,
        batch_size=_BATCH_SIZE.value,
        on_batch=lambda tokens: line.update(min(tokens, _MAX_TOKENS.value)),
    )
    line.close()
    return text


def _command() -> str:
    runs = " ".join(f"--workdir={workdir}" for workdir in _WORKDIR.value)
    return f"python -m dsmoe_jax analyse {runs} --to={_TO.value} --max_tokens={_MAX_TOKENS.value}"

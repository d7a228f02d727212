"""The report of an experiment: what it says, in which order.  How it looks is in `blocks.py`.

Every number and every verdict is computed from the results; a missing one is shown as missing.
"""

from __future__ import annotations

import datetime
import os
import pathlib

from dsmoe_jax.config import tokens_after
from dsmoe_jax.report import plots, tables
from dsmoe_jax.report.blocks import (
    Block,
    Code,
    Facts,
    Heading,
    Picture,
    Pictures,
    Text,
    standalone_svg,
    to_html,
    to_markdown,
)
from dsmoe_jax.study import orderings
from dsmoe_jax.study.orderings import CONFIDENCE, HOLDS, MISSING, REVERSED, UNDECIDED, Ordering
from dsmoe_jax.study.results import Comparison

BALANCE_NOTE = (
    "MaxVio = (largest load − mean load) / mean load of a layer's experts, mean over layers, in the"
    " logged batches and over a window of the last 100 steps or so; dead experts are those of all"
    " layers that a batch gave no token. Means over seeds."
)


def write(comparison: Comparison, directory: pathlib.Path) -> pathlib.Path:
    """Writes report.html (self-contained), report.md and pictures/*.svg; returns the first."""
    title = comparison.experiment.title
    figures = plots.draw(comparison)
    blocks = build(comparison, figures)
    pictures = directory / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        _replace(pictures / f"{name}.svg", standalone_svg(figure))
    _replace(directory / "report.md", to_markdown(title, blocks, pictures.name))
    _replace(directory / "report.html", to_html(title, blocks))
    return directory / "report.html"


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def build(comparison: Comparison, figures: dict) -> list[Block]:
    """The report's blocks in order."""
    experiment = comparison.experiment
    pictures = [
        Picture(name, plots.PLOTS[name].title, plots.PLOTS[name].caption, figure)
        for name, figure in figures.items()
    ]
    found = orderings.compare(comparison)
    blocks: list[Block] = [
        Text(f"{experiment.source}, repeated at the {comparison.scale} scale", "source"),
        *(Text(sentence, "finding") for sentence in findings(comparison)),
        tables.results_table(comparison),
        Text(_results_note(comparison), "note"),
    ]
    if found:
        blocks += [Heading("What the paper says, and what came out here"), Text(experiment.claim)]
        if any(arm.paper_loss is not None for arm in comparison.arms):
            blocks.append(tables.paper_table(comparison))
        blocks += [tables.orderings_table(found), Text(_orderings_note(comparison, found), "note")]
    if (table := tables.balance_table(comparison)) is not None:
        blocks += [Heading("Load over training"), Text(BALANCE_NOTE, "note"), table]
    if pictures:
        blocks += [Heading("Pictures"), Pictures(pictures)]
    if (table := tables.domains_table(comparison)) is not None:
        blocks += [
            Heading("Held-out text by domain"),
            Text("Bits per byte, mean over seeds."),
            table,
        ]
    blocks += [Heading("What was run"), facts(comparison)]
    blocks += [Heading("What was kept equal"), *equal_blocks(comparison)]
    blocks += [Heading("How to repeat it"), Code(comparison.command)]
    return [
        *blocks,
        Text(
            "The command continues where it was interrupted and skips what is finished. The numbers"
            " are in `results.jsonl`, one line a run, rebuilt from the runs' own logs."
            f" Report made on {datetime.date.today().isoformat()}.",
            "note",
        ),
    ]


def findings(comparison: Comparison) -> list[str]:
    """The result in a few sentences."""
    sentences, found = [], orderings.compare(comparison)
    ranked = sorted(tables.mean_losses(comparison).items(), key=lambda item: item[1])
    if len(ranked) > 1:
        (best, low), (second, next_low) = ranked[:2]
        sentence = (
            f"**{best}** has the lowest validation loss: {low:.3f} nats per token,"
            f" {next_low - low:.3f} below {second}"
        )
        half_width = orderings.difference_half_width(orderings.losses_by_seed(comparison))
        if half_width is None:
            sentence += ". With a single seed nothing is known about its reliability."
        else:
            clear = "more" if next_low - low > half_width else "less"
            sentence += (
                f" – {clear} than the ± {half_width:.3f} to which differences are known here."
            )
        sentences.append(sentence)
    if found:
        sentences.append(_count_sentence(found))
    missing = [f"{r.arm} (seed {r.seed})" for r in comparison.rows if not r.finished]
    if missing:
        sentences.append(f"Not finished, so not in these numbers: {', '.join(missing)}.")
    return sentences


def _count_sentence(found: list[Ordering]) -> str:
    counts = {v: sum(o.verdict == v for o in found) for v in (HOLDS, REVERSED, UNDECIDED, MISSING)}
    said = {
        HOLDS: "hold" if counts[HOLDS] != 1 else "holds",
        REVERSED: "came out reversed",
        UNDECIDED: "cannot be decided from this many runs",
        MISSING: "cannot be judged yet, for want of finished runs",
    }
    parts = [f"{counts[v]} {said[v]}" for v in said if counts[v]]
    listing = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    plural = "orderings" if len(found) != 1 else "ordering"
    known = any(o.half_width is not None for o in found)
    caution = "" if known else ", going by the bare signs of single differences"
    return f"Of the paper's {len(found)} {plural} of two models, {listing} at this scale{caution}."


def _results_note(comparison: Comparison) -> str:
    several = any(len(comparison.of_arm(arm)) > 1 for arm in comparison.arms)
    spread = " ± is the standard deviation over seeds." if several else ""
    return (
        f"Loss in nats per token on held-out text; means over seeds.{spread} MaxVio (how"
        " far the most loaded expert is above the mean; mean over layers) and dead experts (of all"
        " layers) are taken on the held-out text; in training: MaxVio of the load of the last 100"
        f" steps or so. {tables.NONE} means that a number does not exist (a dense model has no"
        " router) or is not there yet. FLOPs: training, as the paper counts."
    )


def _orderings_note(comparison: Comparison, found: list[Ordering]) -> str:
    seeds = orderings.common_seeds(orderings.losses_by_seed(comparison))
    tail = " Losses of other data, vocabularies and sizes do not compare; orders and signs do."
    if any(o.half_width is not None for o in found):
        return (
            f"Differences in nats per token, mean over the {len(seeds)} seeds that all arms have, ±"
            f" half a {CONFIDENCE:.0%} interval: the noise left after each arm's and each seed's"
            " mean, Student's t. An ordering holds, or is reversed, when the interval excludes 0;"
            " each is judged by itself." + tail
        )
    return (
        "One seed: the verdict is the bare sign of one difference. How far another seed would move"
        " it is not known; run with --seeds=2 or more to learn it." + tail
    )


def facts(comparison: Comparison) -> Facts:
    """Scale, sizes, data, machine and duration."""
    rows = comparison.rows
    config = comparison.arms[0].run_config(comparison.scale, 0, dict(comparison.overrides))
    model, train, data = config.model, config.train, config.data
    seconds = [row.seconds for row in rows if row.seconds is not None]
    machines = sorted({row.machine for row in rows if row.machine})
    prints = sorted({row.data_fingerprint for row in rows if row.data_fingerprint})
    held_out = {row.validation_tokens for row in rows if row.validation_tokens}
    finished = sum(row.finished for row in rows)
    tokens = tables.short(tokens_after(config, train.steps))
    return Facts(
        {
            "scale": f"{comparison.scale}: {model.num_hidden_layers} layers, hidden size"
            f" {model.hidden_size}, vocabulary {model.vocab_size:,}",
            "training": f"{train.steps:,} steps of {train.global_batch_size} sequences of"
            f" {data.sequence_length} tokens: {tokens} tokens for every model",
            "runs": f"{finished} finished of {len(rows)}; seeds"
            f" {', '.join(str(s) for s in sorted({row.seed for row in rows}))}",
            "data": f"`{data.corpus}`, fingerprint"
            f" {', '.join(p[:12] for p in prints) or 'not known yet'}; judged on"
            f" {', '.join(f'{n:,}' for n in sorted(held_out)) or tables.NONE} held-out tokens",
            "time": f"{tables.duration(sum(seconds))} for {len(seconds)} runs, on average"
            f" {tables.duration(sum(seconds) / len(seconds))} each"
            if seconds
            else tables.NONE,
            "machine": "; ".join(machines) or "not recorded",
        }
        | ({"changed": _overrides(comparison)} if comparison.overrides else {})
    )


def _overrides(comparison: Comparison) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in comparison.overrides.items())


def equal_blocks(comparison: Comparison) -> list[Block]:
    """The fairness rules; they were checked before training."""
    names = ", ".join(f"`{name}`" for name in comparison.experiment.may_differ)
    return [
        Text(
            "Checked before training; an unfair comparison is refused. The arms' configs differ in"
            f" {names} and in nothing else: the same text in the same order, the same steps, batch,"
            " learning rate and seeds."
        ),
        tables.equal_table(comparison),
    ]

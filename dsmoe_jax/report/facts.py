"""Facts about the runs of a report: sizes, data, machine, time, and what was kept equal."""

from __future__ import annotations

from collections.abc import Callable

from dsmoe_jax.config import tokens_after
from dsmoe_jax.config.stages import every_value
from dsmoe_jax.progress import duration
from dsmoe_jax.report import tables
from dsmoe_jax.report.blocks import Block, Facts, Text
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE, short
from dsmoe_jax.study.results import Comparison

# A noun in the sentence about what is the same, and its key.
SAME = {
    "steps": "train.steps",
    "batch": "train.global_batch_size",
    "learning rate": "optimizer.peak_learning_rate",
}


def facts(comparison: Comparison) -> Facts:
    """Scale, sizes, data, machine and duration."""
    rows = comparison.rows
    overrides = dict(comparison.overrides)
    configs = [arm.run_config(comparison.scale, 0, overrides) for arm in comparison.arms]
    config = configs[0]
    model = config.model
    data = config.data
    machines = sorted({row.machine for row in rows if row.machine})
    prints = sorted({row.data_fingerprint for row in rows if row.data_fingerprint})
    held_out = {int(tokens) for row in rows if (tokens := row["validation_tokens"])}
    finished = sum(row.finished for row in rows)
    tokens = _span([tokens_after(c, c.train.steps) for c in configs], short)
    every = "for every model" if len({c.train.steps for c in configs}) == 1 else "by model"
    steps = _span([c.train.steps for c in configs], "{:,}".format)
    batches = dict.fromkeys(every_value(config, "train.global_batch_size"))
    pairs = {
        "scale": f"{comparison.scale}: {model.num_hidden_layers} layers, hidden size"
        f" {_span([c.model.hidden_size for c in configs], str)}, vocabulary {model.vocab_size:,}",
        "training": f"{steps} steps of {', '.join(map(str, batches))} sequences of"
        f" {data.sequence_length} tokens: {tokens} tokens {every}",
        "runs": f"{finished} finished of {len(rows)}; seeds"
        f" {', '.join(str(s) for s in sorted({row.seed for row in rows}))}",
        "data": f"`{literal(str(data.corpus))}`, fingerprint"
        f" {', '.join(p[:12] for p in prints) or 'not known yet'}; judged on"
        f" {', '.join(f'{n:,}' for n in sorted(held_out)) or NONE} held-out tokens",
        "time": _time(comparison),
        "machine": literal("; ".join(machines)) or "not recorded",
    }
    if comparison.overrides:
        changes = comparison.overrides.items()
        pairs["changed"] = ", ".join(f"`{literal(f'{key}={value}')}`" for key, value in changes)
    return Facts(pairs)


def _span(values: list[int], show: Callable[[int], str]) -> str:
    """The number, or the smallest and the largest of several."""
    low, high = min(values), max(values)
    return show(low) if low == high else f"{show(low)} to {show(high)}"


def _time(comparison: Comparison) -> str:
    seconds = [value for row in comparison.rows if (value := row["seconds"]) is not None]
    if not seconds:
        return NONE
    mean = sum(seconds) / len(seconds)
    return f"{duration(sum(seconds))} for {len(seconds)} runs, on average {duration(mean)} each"


def equal_blocks(comparison: Comparison) -> list[Block]:
    """The fairness rules; they were checked before training."""
    may_differ = comparison.experiment.may_differ
    names = ", ".join(f"`{name}`" for name in may_differ)
    same = ", ".join(noun for noun, key in SAME.items() if key not in may_differ)
    text = Text(
        "Checked before training; an unfair comparison is refused. The arms' configs differ in"
        f" {names} and in nothing else: the same text in the same order, the same {same} and seeds."
    )
    return [text, tables.equal_table(comparison)] if comparison.experiment.equal else [text]

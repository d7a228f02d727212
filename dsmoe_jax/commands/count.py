"""Counts a model's parameters and FLOPs beside the figures of the DeepSeekMoE paper.

python -m dsmoe_jax count                                        # every model of the paper
python -m dsmoe_jax count --config=configs/dsmoe_2b.py:demo      # one model
python -m dsmoe_jax count --config=configs/dsmoe_16b.py:paper --json
python -m dsmoe_jax count --config=configs/dsmoe_2b_staged.py    # also a row for each stage

Activated parameters and FLOPs of a run in stages are means over its tokens.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import Config, Stage, files, from_config_dict, stages_of
from dsmoe_jax.model import size
from dsmoe_jax.planning import papers

command_line.define_config()
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_ALL = flags.DEFINE_bool("all", False, "Every model of the paper (the default without --config).")

QUANTITIES = {
    "total": "total",
    "activated": "activated",
    "activated_without_embedding": "w/o embedding",
    "expert_total": "experts",
    "expert_activated": "experts act.",
    "flops_per_sequence": "FLOPs/sequence",
}


def report(config: Config) -> dict[str, Any]:
    """Figures of a config; under "paper" the printed ones, if the paper has this exact model.

    Under "stages" are the figures of each stage, if there are several.
    """
    figures = size.account(config)
    return {
        "name": config.name,
        "scale": config.scale,
        **figures,
        "sequence_length": config.data.sequence_length,
        "train_flops_per_token": size.train_flops_per_token(config),
        "stages": [_report_of_stage(stage) for stage in _several_stages(config)],
        "state_bytes": _state_bytes(config),
        "weight_bytes": size.weight_bytes(config.model).total,
        "paper": {key: papers.value(digits) for key, digits in _paper(config).items()},
    }


def _state_bytes(config: Config) -> dict[str, int] | None:
    """Bytes of training state; None for a model that cannot be trained."""
    if config.model.moe.quantised is not None:
        return None
    counted = size.parameters_by_formula(config.model)
    return size.state_bytes(counted.total + counted.mtp)


def _several_stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run; none of a run that is one stage."""
    stages = stages_of(config)
    return stages if len(stages) > 1 else ()


def _report_of_stage(stage: Stage) -> dict[str, Any]:
    return {
        "steps": [stage.first + 1, stage.end],
        "tokens": stage.tokens,
        **size.account(stage.config),
        "train_flops_per_token": size.train_flops_per_token(stage.config),
    }


def _paper(config: Config) -> dict[str, str]:
    """Printed figures; none for another scale or after an override of a size."""
    model = papers.MODELS.get(config.name)
    if config.scale != "paper" or model is None or not model.figures:
        return {}
    original = _load(config.name)
    same = all(stage.config.model == original.model for stage in stages_of(config))
    same &= config.data.sequence_length == original.data.sequence_length
    return model.figures if same else {}


def _load(name: str) -> Config:
    """A model of the paper, at the paper's size."""
    return from_config_dict(files.load(f"configs/{name}.py"))


def table(configs: list[Config]) -> str:
    """Table with one line a model; each figure as "ours / the paper's", with notes below."""
    rows = [["model", *QUANTITIES.values()]]
    notes = []
    for config in configs:
        figures = size.account(config)
        paper = _paper(config)
        row = [config.name + (f":{config.scale}" if config.scale != "paper" else "")]
        for key in QUANTITIES:
            cell = _short(figures[key])
            if key in paper:
                cell += f" / {paper[key]}"
                off = papers.deviation(figures[key], paper[key])
                if off:
                    cell += f" ({off:+.2%})"
                if reason := papers.MODELS[config.name].irreproducible.get(key):
                    cell += " !"
                    notes.append(f"! {config.name}, {key}: not reproducible. {reason}.")
            row.append(cell)
        rows.append(row)
        rows += _rows_of_stages(config)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if any(_paper(config) for config in configs):
        notes.insert(0, "ours / as the paper prints it (how far outside those digits, if at all)")
    return "\n".join([*lines, "", *notes]).rstrip()


def _rows_of_stages(config: Config) -> list[list[str]]:
    """A row for each stage of a run, if there are several."""
    stages = _several_stages(config)
    total = sum(stage.tokens for stage in stages)
    rows = []
    for stage in stages:
        figures = size.account(stage.config)
        share = f"{100 * stage.tokens / total:.3g} % of the tokens"
        name = f"  steps {stage.first + 1} to {stage.end}, {share}"
        rows.append([name, *(_short(figures[key]) for key in QUANTITIES)])
    return rows


def _short(value: float) -> str:
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:#.4g}".rstrip(".") + letter
    return f"{value:.4g}"


def details(config: Config) -> str:
    """Bytes of training state, and FLOPs at the widths used, which the paper does not print."""
    counted = size.parameters_by_formula(config.model)
    state = _state_bytes(config)
    if state is None:
        held = size.weight_bytes(config.model)
        experts = held.routed + held.shared
        state_line = f"Weights: {_gb(held.total)}, quantised experts {_gb(experts)} of it"
    else:
        state_line = (
            f"Training state (float32): parameters {_gb(state['parameters'])}, optimizer"
            f" {_gb(state['optimizer'])}, gradients {_gb(state['gradients'])}"
        )
    return (
        f"{state_line}\n"
        f"Training FLOPs per token at the widths used:"
        f" {_short(size.train_flops_per_token(config))}"
        f"{_modules(counted)}"
    )


def _gb(n_bytes: float) -> str:
    """Three digits, without an exponent: 2,730 GB."""
    return f"{float(f'{n_bytes / 1e9:.3g}'):,g} GB"


def _modules(counted: size.Parameters) -> str:
    """A line on multi-token prediction, if the model has it."""
    if not counted.mtp:
        return ""
    return (
        f"\nModules of multi-token prediction, beside the total: {_short(counted.mtp)} parameters,"
        f" {_short(counted.mtp_activated)} activated; they share embedding and head"
    )


def main() -> None:
    """Runs the command."""
    everything = _ALL.value or command_line.FLAGS.config is None
    names = [name for name, model in papers.MODELS.items() if model.figures]
    configs = [_load(name) for name in names] if everything else [command_line.config()]
    if _JSON.value:
        reports = [report(config) for config in configs]
        print(json.dumps(reports if everything else reports[0], indent=2))
    else:
        print(table(configs))
        if not everything:
            print(details(configs[0]))

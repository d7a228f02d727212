"""Costs of models, as JSON and as tables; arithmetic in economics.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.hardware.chips import CHIPS, Chip
from dsmoe_jax.model import size
from dsmoe_jax.planning import economics
from dsmoe_jax.planning.economics import Deal, Model
from dsmoe_jax.planning.prices import Prices

_ALL_BATCHES = range(1, 4097)  # in which one model is looked for that decodes faster


class Setting(NamedTuple):
    """Conditions that costs depend on besides the models.

    Attributes:
      chip: a name in hardware/chips.py.
      batches: sequences that are decoded together.
      context: tokens of each in the cache.
      mfu: share of the chip's peak that training reaches.
      weight_bits, expert_bits: of a weight, and of one of a routed expert.
      prices: None: no money.
      rate: tokens that are served in a second; None: not known.
    """

    chip: str
    batches: Sequence[int]
    context: int
    mfu: float = 1.0
    weight_bits: int = 16
    expert_bits: int = 16
    prices: Prices | None = None
    rate: float | None = None


def report(
    configs: Sequence[Config], setting: Setting, loads: Sequence[np.ndarray | None]
) -> dict[str, Any]:
    """All costs of some models; the first one beside each of the others.

    Args:
      configs: of the models, one or several.
      setting: see `Setting`.
      loads: recorded loads of each model's experts, (L, E), or None.
    """
    models = [
        economics.of_model(
            config.model,
            setting.context,
            load_LE,
            weight_bytes=setting.weight_bits / 8,
            expert_bytes=setting.expert_bits / 8,
        )
        for config, load_LE in zip(configs, loads, strict=True)
    ]
    names = [name_of(config) for config in configs]
    found = [
        {"name": name, **_of_one(config, model, setting)}
        for name, config, model in zip(names, configs, models, strict=True)
    ]
    trained = [economics.of_training(config) for config in configs]
    chip = CHIPS[setting.chip]
    hours = [training.chip_hours(chip, setting.mfu) for training in trained]
    return {
        "chip": setting.chip,
        "context": setting.context,
        "mfu": setting.mfu,
        "models": found,
        "beside": [
            {"names": [names[0], names[i]]}
            | _beside((models[0], models[i]), (hours[0], hours[i]), setting)
            for i in range(1, len(models))
        ],
    }


def name_of(config: Config) -> str:
    """Name of a model, with its scale unless it is the paper's."""
    return config.name if config.scale == "paper" else f"{config.name}:{config.scale}"


def _of_one(config: Config, model: Model, setting: Setting) -> dict[str, Any]:
    chip = CHIPS[setting.chip]
    training = economics.of_training(config)
    hours = training.chip_hours(chip, setting.mfu)
    prices = setting.prices
    money = None if prices is None else hours * prices.chip_hour[setting.chip]
    return {
        "parameters": model.parameters,
        "activated": model.activated,
        "train_flops_per_token": size.train_flops_per_token(config),
        "decode_flops_per_token": model.flops,
        "weight_bytes": model.bytes,
        "cache_bytes_per_token": model.cache,
        "training": {
            "tokens": training.tokens,
            "flops": training.flops,
            "chip_hours": hours,
            "money": money,
        },
        "decoding": [_of_batch(model, batch, chip, setting) for batch in setting.batches],
    }


def _of_batch(model: Model, batch: int, chip: Chip, setting: Setting) -> dict[str, Any]:
    seconds = model.chip_seconds(batch, chip)
    prices = setting.prices
    hour = None if prices is None else prices.chip_hour[setting.chip]
    return {
        "batch": batch,
        "chips": model.chips(batch, chip),
        "touched": model.touched(batch) if model.touch_LE.size else None,
        "bytes_read": model.bytes_read(batch),
        "tokens_per_second": 1 / seconds,
        "money_per_million": None if hour is None else 1e6 * seconds / economics.HOUR * hour,
    }


def _beside(
    models: tuple[Model, Model], hours: tuple[float, float], setting: Setting
) -> dict[str, Any]:
    """Points at which two models cost the same."""
    chip = CHIPS[setting.chip]
    intervals = economics.faster_by_batch(*models, chip, _ALL_BATCHES)
    return {
        "faster": [interval._asdict() for interval in intervals],
        "break_even": [
            {"batch": batch, **_break_even(models, hours, batch, setting)}
            for batch in setting.batches
        ],
    }


def _break_even(
    models: tuple[Model, Model], hours: tuple[float, float], batch: int, setting: Setting
) -> dict[str, Any]:
    """Points of equal cost at a batch; `cheaper` is which one before and after."""
    chip = CHIPS[setting.chip]
    token = [model.chip_seconds(batch, chip) / economics.HOUR for model in models]
    one, other = (
        Deal(training, hours_of_token, model.chips(1, chip))
        for model, training, hours_of_token in zip(models, hours, token, strict=True)
    )
    rate = economics.break_even_rate(one, other)
    price = None
    if setting.rate is not None:
        asked = setting.rate * economics.HOUR
        price = economics.break_even_memory(*models, (token[0], token[1]), asked)
    prices = setting.prices
    tokens = economics.break_even_tokens(one, other)
    first = int((other.training, other.token) < (one.training, one.token))
    return {
        "cheaper": [first, first if tokens is None else 1 - first],
        "tokens": tokens,
        "tokens_per_second": None if rate is None else rate / economics.HOUR,
        "gb_hour_in_chip_hours": price,
        "gb_hour": None if price is None or prices is None
        else price * prices.chip_hour[setting.chip],
    }  # fmt: skip


def text(found: Mapping[str, Any], prices: Prices | None) -> str:
    """The tables of a report, in Markdown."""
    blocks = [_sizes(found, prices), _decoding(found, prices)]
    blocks += [_pair(found, pair, prices) for pair in found["beside"]]
    return "\n\n".join(blocks)


def _sizes(found: Mapping[str, Any], prices: Prices | None) -> str:
    models = found["models"]
    at = f"{found['chip']}, at {100 * found['mfu']:g} % of its peak"

    def row(title: str, value: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [title, *(value(model) for model in models)]

    rows = [
        row("", lambda m: m["name"]),
        row("parameters", lambda m: short(m["parameters"])),
        row("activated for a token", lambda m: short(m["activated"])),
        row("FLOPs of a token in training", lambda m: short(m["train_flops_per_token"])),
        row(
            f"FLOPs of a token in decoding, context {found['context']:,}",
            lambda m: short(m["decode_flops_per_token"]),
        ),
        row("weights, GB", lambda m: f"{m['weight_bytes'] / 1e9:,.3g}"),
        row("cache of a token, kB", lambda m: f"{m['cache_bytes_per_token'] / 1e3:,.3g}"),
        row("tokens of training", lambda m: short(m["training"]["tokens"])),
        row(f"hours of one {at}", lambda m: short(m["training"]["chip_hours"])),
    ]
    if prices is not None:
        rows.append(row(f"training, {prices.currency}", lambda m: short(m["training"]["money"])))
    return markdown(rows)


def _decoding(found: Mapping[str, Any], prices: Prices | None) -> str:
    """A row for each batch: what it touches, and the speed of one chip."""
    models = found["models"]
    heads = ["batch"]
    for model in models:
        name = model["name"]
        heads += [f"{name}: experts touched", "chips", f"tokens/s of one {found['chip']}"]
        heads += [f"{prices.currency} a million tokens"] if prices is not None else []
    rows = [heads]
    for i, first in enumerate(models[0]["decoding"]):
        row = [f"{first['batch']:,}"]
        for model in models:
            cell = model["decoding"][i]
            touched = cell["touched"]
            row += ["-" if touched is None else f"{100 * touched:.3g} %", str(cell["chips"])]
            row.append(short(cell["tokens_per_second"]))
            row += [short(cell["money_per_million"])] if prices is not None else []
        rows.append(row)
    return markdown(rows)


def _pair(found: Mapping[str, Any], pair: Mapping[str, Any], prices: Prices | None) -> str:
    names = pair["names"]
    spans = ", ".join(
        f"{names[span['faster']]} from batch {span['first']:,} to {span['last']:,}"
        for span in pair["faster"]
    )
    rows = [["batch", "cheaper, training and serving", "equal cost of serving at tokens/s"]]
    some_price = any(row["gb_hour_in_chip_hours"] is not None for row in pair["break_even"])
    if some_price:
        unit = "chip-hours" if prices is None else prices.currency
        rows[0].append(f"equal cost at a price of a GB-hour, {unit}")
    for row in pair["break_even"]:
        cells = [f"{row['batch']:,}", _cheaper(row, names), short(row["tokens_per_second"])]
        if some_price:
            key = "gb_hour_in_chip_hours" if prices is None else "gb_hour"
            cells.append(short(row[key]))
        rows.append(cells)
    return (
        f"{names[0]} beside {names[1]} on {found['chip']}: faster per chip is {spans}.\n\n"
        + markdown(rows)
    )


def _cheaper(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Which model is the cheaper one, up to which number of tokens served."""
    before, after = (names[i] for i in row["cheaper"])
    if row["tokens"] is None:
        return f"{before} always"
    return f"{before} up to {short(row['tokens'])} tokens, then {after}"


def short(value: float | None) -> str:
    """Three digits and a unit, without an exponent; "-" for no number."""
    if value is None:
        return "-"
    for unit, letter in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"),
                         (1e9, "B"), (1e6, "M"), (1e3, "K")):  # fmt: skip
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])

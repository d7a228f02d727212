"""Costs of a mixture and a dense model of equal quality: arithmetic, seconds on any machine.

    python -m benchmarks.economics                                # the tables of docs/economics.md
    python -m benchmarks.economics --picture=docs/economics.png   # and its picture

DeepSeekMoE 16B and DeepSeek 7B, which V1 finds equally good (table 3), by
dsmoe_jax/planning/economics.py.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import configs
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import economics, economics_report
from dsmoe_jax.planning.economics_report import Setting

PAIR = ("dsmoe_16b", "deepseek_7b")
# Shares of experts that a batch touches are shown of these.
MIXTURES = ("mixtral_8x7b", "dsmoe_16b", "deepseek_v3")
BATCHES = (1, 8, 64, 512)
CONTEXTS = (512, 4096)
CHIP = "h100"


class Case(NamedTuple):
    """Tables of the page: a chip, a context, and key heads of both models (None: their own)."""

    chip: str
    context: int
    key_heads: int | None = None


CASES = (Case("h100", 512), Case("h100", 4096), Case("h100", 4096, 4), Case("v5e", 512))


def load(name: str) -> Config:
    """A model at its own size."""
    return from_config_dict(configs.load(name))


def report(case: Case) -> dict[str, Any]:
    """Costs of the pair."""
    pair = [load(name) for name in PAIR]
    if case.key_heads is not None:
        grouped = {"model.attention.num_key_value_heads": case.key_heads}
        pair = [replace(config, **grouped) for config in pair]
    return economics_report.report(pair, Setting(case.chip, BATCHES, case.context), [None, None])


def tables() -> list[str]:
    """The tables of the page, in Markdown, for each of `CASES`."""
    return [economics_report.text(report(case), None) for case in CASES]


def draw(path: Path) -> None:
    """Speed and share of experts by batch, and chip-hours by tokens served."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    _draw_touched(axes[0])
    _draw_speed(axes[1], CHIP)
    _draw_hours(axes[2], CHIP)
    figure.savefig(path, dpi=110)


def _powers() -> list[int]:
    return [2**n for n in range(13)]


def _draw_touched(panel: Any) -> None:
    for name in MIXTURES:
        config = load(name)
        model = economics.of_model(config.model, context=1)
        moe = config.model.moe
        label = f"{name}: {moe.num_experts_per_tok} of {moe.n_routed_experts}"
        panel.plot(_powers(), [100 * model.touched(b) for b in _powers()], label=label)
    panel.set(xlabel="sequences decoded together", ylabel="routed experts read, %", ylim=(0, 105))
    panel.set_title("experts that a batch touches")
    panel.set_xscale("log", base=2)
    panel.legend(loc="lower right")


def _draw_speed(panel: Any, chip: str) -> None:
    for color, name in zip(("C0", "C1"), PAIR, strict=True):
        for style, context in zip(("-", "--"), CONTEXTS, strict=True):
            model = economics.of_model(load(name).model, context)
            speed = [1 / model.chip_seconds(b, CHIPS[chip]) for b in _powers()]
            label = f"{name}, context {context:,}"
            panel.plot(_powers(), speed, color=color, linestyle=style, label=label)
    panel.set(xlabel="sequences decoded together", ylabel=f"tokens/s of one {chip}")
    panel.set_title("speed of decoding, at most")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=20)  # room for the legend
    panel.legend(loc="lower right")


def _draw_hours(panel: Any, chip: str) -> None:
    served = [10**9 * 4**n for n in range(9)]
    for color, name in zip(("C0", "C1"), PAIR, strict=True):
        config = load(name)
        hours = economics.of_training(config).chip_hours(CHIPS[chip])
        model = economics.of_model(config.model, CONTEXTS[0])
        for style, batch in zip(("-", "--"), (8, 512), strict=True):
            token = model.chip_seconds(batch, CHIPS[chip]) / economics.HOUR
            label = f"{name}, batch {batch}"
            total = [hours + n * token for n in served]
            panel.plot(served, total, color=color, linestyle=style, label=label)
    panel.set(xlabel="tokens served", ylabel=f"hours of one {chip}, training included")
    panel.set_title(f"cost in all, context {CONTEXTS[0]}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, help="also draw, into this file")
    args = parser.parse_args()
    print("\n\n".join(tables()))
    if args.picture:
        draw(args.picture)


if __name__ == "__main__":
    main()

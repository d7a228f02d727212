"""What the config files share: the table of scales, and how a model is put together from it.

A model is described by numbers relative to its hidden size d, so that it shrinks from the paper's
size to a laptop's without changing its kind: widths count in standard FFNs (8 d^2 parameters,
three matrices of d x 8d/3).  Only a file's `SETUP` says how one model differs from another;
everything about sizes, steps and learning rates is in this file.

Choices that the papers leave open:
- V1 gives the 2B expert widths only relative to the standard FFN.  8 * 1280 / 3 is not a whole
  number: a standard FFN is 3413 wide here (nominal 3413.33) and a quarter expert 853 (853.33), so
  that the experts of DeepSeekMoE and GShard differ by 0.04 % in size.  The smaller scales have
  hidden sizes divisible by 24, where standard, half, quarter and eighth widths are exact.
- The balance terms count load within a sequence, as in the released models.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

import ml_collections

from dsmoe_jax.config import (
    AttentionConfig,
    BalanceTerm,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
    to_config_dict,
)
from dsmoe_jax.config.frozen import FrozenDict


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes and training settings that all models of a comparison have in common.

    Attributes:
      hidden, layers, heads, head_dim, kv_heads: of the Transformer.
      vocab: rows of the embedding; tokenizer_vocab (0: the same) is what the tokenizer fills.
      corpus: None where no corpus that comes with the project is large enough: the user names one.
      sequence: tokens; batch: sequences of one optimizer step.
      lr: peak learning rate; decay_at: shares of the steps at which it drops by 0.316.
    """

    hidden: int
    layers: int
    heads: int
    head_dim: int
    vocab: int
    sequence: int
    batch: int
    steps: int
    lr: float
    warmup: int
    kv_heads: int = 0  # 0: as many as heads
    tokenizer_vocab: int = 0
    init: float = 0.006
    decay_at: tuple[float, ...] = (0.8, 0.9)
    corpus: str | None = None
    accumulation: int = 1
    remat: str = "full"
    log_every: int = 10
    checkpoint_every: int = 1000
    eval_every: int = 1000
    eval_batches: int | None = None  # None: the whole validation split


# V1 sections 4.1, 5.1, 7.1 and table 7: the sizes behind "paper" differ from family to family.
PAPER_2B = Scale(
    hidden=1280, layers=9, heads=10, head_dim=128, vocab=8192, sequence=2048, batch=2048,
    steps=25_000, lr=1.08e-3, warmup=2000,
)  # fmt: skip
PAPER_16B = Scale(
    hidden=2048, layers=28, heads=16, head_dim=128, vocab=102_400, tokenizer_vocab=100_000,
    sequence=4096, batch=4608, steps=106_449, lr=4.2e-4, warmup=2000,
)  # fmt: skip
PAPER_145B = dataclasses.replace(
    PAPER_16B, hidden=4096, layers=62, heads=32, steps=13_000, lr=3.0e-4, decay_at=()
)
# Dense models to compare with.  V1 prints none of their training settings: those of the 16B (7B)
# and of the 145B (67B, which V1 trained on the same 245B tokens) are used here.
PAPER_7B = dataclasses.replace(PAPER_16B, hidden=4096, layers=30, heads=32)
PAPER_67B = dataclasses.replace(PAPER_145B, hidden=8192, layers=95, heads=64, kv_heads=8)
PAPER_LLAMA2_7B = dataclasses.replace(PAPER_7B, layers=32, vocab=32_000, tokenizer_vocab=32_000)

# Below the paper's scale every family has the same sizes and keeps its own ratios.  The initial
# deviation grows as hidden^-1/2 from the paper's 0.006 at 1280.
SMALL = {
    # One 80 GB GPU.  0.63B tokens at 0.85 GFLOP each (DeepSeekMoE 2B) are 5.3e17 FLOPs: 22 minutes
    # at 40 % of 990 TFLOP/s bfloat16.  An estimate; dense_2b_x16 takes five times as much.
    "proxy": Scale(
        hidden=768, layers=9, heads=6, head_dim=128, vocab=8192, sequence=2048, batch=256,
        steps=1200, lr=1.5e-3, warmup=120, init=0.008, accumulation=8, remat="none",
        checkpoint_every=200, eval_every=200, eval_batches=20,
    ),
    # Two CPU cores, less than a minute a model and seed.  As narrow as this because a narrow
    # model runs out of capacity within the million tokens that fit: at hidden 96 the same minutes
    # did not tell a dense model from a mixture of experts (experiments/LOG.md).
    "demo": Scale(
        hidden=48, layers=4, heads=2, head_dim=24, vocab=2048, sequence=128, batch=16,
        steps=480, lr=6e-3, warmup=48, init=0.03, corpus="demo", remat="none",
        checkpoint_every=240, eval_every=240, eval_batches=80,
    ),
    # Seconds, for tests; needs no download.
    "smoke": Scale(
        hidden=48, layers=2, heads=2, head_dim=24, vocab=512, sequence=64, batch=4,
        steps=8, lr=4e-3, warmup=2, init=0.03, corpus="stdlib", remat="none",
        log_every=1, checkpoint_every=4, eval_every=4, eval_batches=2,
    ),
}  # fmt: skip
SCALES = ("paper", *SMALL)


@dataclasses.dataclass(frozen=True)
class Setup:
    """How one model differs from the others, in numbers that hold at every scale.

    Attributes:
      name: of the config file, with its options.
      paper: the family's sizes at paper scale.
      width: of one expert relative to a standard FFN.
      balance: factors of the balance terms, by name; expert_groups: devices of the device term.
      dense_layers, dense_width: leading layers with a dense FFN, and its relative width.
      released_width, released_dense_width: of the released model at paper scale, where known.
      flops_at_released_width: the paper's FLOPs figure is at the released widths instead of the
        nominal ones (found by comparing digits: 145B and 142B).
    """

    name: str
    paper: Scale
    shared: int
    routed: int
    top_k: int
    width: float
    router: str = "topk"
    balance: FrozenDict[str, float] = FrozenDict(expert=0.01)
    expert_groups: int = 1
    dense_layers: int = 0
    dense_width: float = 1.0
    released_width: int | None = None
    released_dense_width: int | None = None
    flops_at_released_width: bool = False


def parse(arg: str, **options: int) -> tuple[str, dict[str, int]]:
    """Splits a config argument such as "demo,shared=2" into a scale and whole-number options.

    Args:
      arg: the part after the colon of `--config=configs/FILE.py:ARG`.
      **options: what the file understands, with defaults.

    Raises:
      ValueError: for an unknown scale or option, or a value that is not a whole number.
    """
    scale, *rest = arg.split(",")
    if scale not in SCALES:
        close = difflib.get_close_matches(scale, SCALES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}{hint}")
    chosen = dict(options)
    for item in rest:
        key, _, value = item.partition("=")
        if key not in options:
            known = ", ".join(options) or "none"
            raise ValueError(f"option {item!r}: no such option of this config; known: {known}")
        if not re.fullmatch(r"\d+", value):
            raise ValueError(f"option {item!r}: must be {key}=WHOLE NUMBER")
        chosen[key] = int(value)
    return scale, chosen


def build(setup: Setup, arg: str) -> ml_collections.ConfigDict:
    """The config of a model at the scale that `arg` names."""
    name, _ = parse(arg)
    scale = setup.paper if name == "paper" else SMALL[name]
    return to_config_dict(
        Config(
            name=setup.name,
            scale=name,
            model=_model(setup, scale, at_paper_scale=name == "paper"),
            data=DataConfig(
                corpus=scale.corpus,
                sequence_length=scale.sequence,
                tokenizer_vocab_size=scale.tokenizer_vocab or scale.vocab,
            ),
            optimizer=OptimizerConfig(
                peak_learning_rate=scale.lr, warmup_steps=scale.warmup, decay_at=scale.decay_at
            ),
            train=TrainConfig(
                steps=scale.steps,
                global_batch_size=scale.batch,
                accumulation_steps=scale.accumulation,
                log_every=scale.log_every,
                checkpoint_every=scale.checkpoint_every,
                eval_every=scale.eval_every,
                eval_batches=scale.eval_batches,
            ),
        )
    )


def _model(setup: Setup, scale: Scale, *, at_paper_scale: bool) -> ModelConfig:
    standard = 8 * scale.hidden / 3
    width, dense_width = round(setup.width * standard), round(setup.dense_width * standard)
    nominal, nominal_dense = setup.width, setup.dense_width
    if at_paper_scale:
        width, dense_width = (
            setup.released_width or width,
            setup.released_dense_width or dense_width,
        )
        if setup.flops_at_released_width:
            nominal, nominal_dense = width / standard, dense_width / standard
    # Grouped-query attention keeps 8 query heads a key/value head, as far as there are heads.
    grouped = bool(setup.paper.kv_heads)
    return ModelConfig(
        vocab_size=scale.vocab,
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        first_k_dense_replace=setup.dense_layers,
        intermediate_size=dense_width,
        nominal_dense_width=nominal_dense,
        initializer_range=scale.init,
        remat=scale.remat,
        attention=AttentionConfig(
            num_attention_heads=scale.heads,
            num_key_value_heads=max(scale.heads // 8, 1) if grouped else scale.heads,
            head_dim=scale.head_dim,
        ),
        moe=MoEConfig(
            n_routed_experts=setup.routed,
            n_shared_experts=setup.shared,
            num_experts_per_tok=setup.top_k,
            moe_intermediate_size=width,
            nominal_width=nominal,
            router=RouterConfig(name=setup.router),
            balance=FrozenDict(
                {name: BalanceTerm(factor) for name, factor in setup.balance.items()}
            ),
            expert_groups=setup.expert_groups,
        ),
    )

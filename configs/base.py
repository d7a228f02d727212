"""Builder of the configs of the files here, and the scales below the paper's.

A model is described by numbers relative to its hidden size d, so that it keeps its ratios at every
scale: widths count in standard FFNs (8 d^2 parameters, three matrices of d x 8d/3).  A file's
`SETUP` has the numbers in which its model differs from others.  Sizes and training settings are the
paper's (dsmoe_jax/planning/papers.py), below its scale those of `SMALL`.

Choices that V1 leaves open:
- The 2B expert widths are only given relative to the standard FFN.  8 * 1280 / 3 is not a whole
  number: a standard FFN is 3413 wide here (nominal 3413.33) and a quarter expert 853 (853.33), so
  that the experts of DeepSeekMoE and GShard differ by 0.04 % in size.  The smaller scales have
  hidden sizes divisible by 24, where standard, half, quarter and eighth widths are exact.
- The balance terms count load within a sequence, as in the released models.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, NamedTuple

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
    replace,
    to_config_dict,
)
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning.papers import Settings


@dataclasses.dataclass(frozen=True)
class Scale:
    """The settings that all models of a comparison share.

    Attributes:
      settings: sizes of the Transformer, training settings.
      corpus: None where no corpus that comes with the project is large enough: the user names one.
      eval_batches: None is the whole validation split.
    """

    settings: Settings
    corpus: str | None = None
    accumulation_steps: int = 1
    remat: str = "full"
    log_every: int = 10
    checkpoint_every: int = 1000
    eval_every: int = 1000
    eval_batches: int | None = None


# Below the paper's scale every mixture has the same sizes and keeps its own ratios; a dense model
# keeps those to the mixture that it is compared with (`Setup.beside`).  The initial
# deviation grows as hidden_size^-1/2 from the paper's 0.006 at 1280.
SMALL = {
    # One 80 GB GPU.  0.63B tokens at 0.85 GFLOP each (DeepSeekMoE 2B) are 5.3e17 FLOPs: 22 minutes
    # at 40 % of 990 TFLOP/s bfloat16.  An estimate; dense_2b_x16 takes five times as much.
    "proxy": Scale(
        Settings(
            hidden_size=768, num_hidden_layers=9, num_attention_heads=6, head_dim=128,
            vocab_size=8192, sequence_length=2048, global_batch_size=256, steps=1200,
            peak_learning_rate=1.5e-3, warmup_steps=120, initializer_range=0.008,
        ),
        accumulation_steps=8, remat="none",
        checkpoint_every=200, eval_every=200, eval_batches=20,
    ),
    # One H100, all five models of table 1 in less than nine minutes with one seed.  39M tokens a
    # model, 40 times the demo's, at 0.22 GFLOP each (DeepSeekMoE; the dense model 0.16) are 3.6e16
    # FLOPs for the five (`--plan`): 4 minutes at 15 % of 989 TFLOP/s bfloat16, and 40 s a model to
    # compile and start are 3.3 more.  An estimate: nothing was timed on a GPU, and a backend that
    # multiplies every row with every expert (`ragged_dot` without a kernel for it) takes many times
    # as long.  Experts of 256 to 1024 are whole tiles of the kernels for it, and half the width has
    # three heads.  The rate is the proxy's times the square root of how much wider that is; the
    # demo's, which a sweep found, is 0.7 of what that line gives.  A micro-batch is 32 sequences:
    # the planner says 28 GB, without attention scores.  39M tokens are 1.22 passes over the
    # corpus's training text.
    "gpu": Scale(
        Settings(
            hidden_size=384, num_hidden_layers=9, num_attention_heads=6, head_dim=64,
            vocab_size=8192, sequence_length=1024, global_batch_size=64, steps=600,
            peak_learning_rate=2.1e-3, warmup_steps=60, initializer_range=0.011,
        ),
        corpus="gpu", accumulation_steps=2, remat="none",
        log_every=10, checkpoint_every=600, eval_every=200, eval_batches=16,
    ),
    # Two CPU cores, less than a minute a model and seed.  As narrow as this because a narrow
    # model runs out of capacity within the million tokens that fit: at a hidden size of 96 the same
    # minutes did not tell a dense model from a mixture of experts (experiments/LOG.md).  The rate
    # has the lowest loss, mean over the models of table 1 (experiments/recipe/rates.py).
    "demo": Scale(
        Settings(
            hidden_size=48, num_hidden_layers=4, num_attention_heads=2, head_dim=24,
            vocab_size=2048, sequence_length=128, global_batch_size=16, steps=480,
            peak_learning_rate=4.2e-3, warmup_steps=48, initializer_range=0.03,
        ),
        corpus="demo", remat="none",
        checkpoint_every=240, eval_every=240, eval_batches=80,
    ),
    # Seconds, for tests; needs no download.
    "smoke": Scale(
        Settings(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=24,
            vocab_size=512, sequence_length=64, global_batch_size=4, steps=8,
            peak_learning_rate=4e-3, warmup_steps=2, initializer_range=0.03,
        ),
        corpus="stdlib", remat="none",
        log_every=1, checkpoint_every=4, eval_every=4, eval_batches=2,
    ),
}  # fmt: skip
SCALES = ("paper", *SMALL)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The numbers in which models differ, the same at every scale.

    Attributes:
      name: of the config file, with its options.
      settings: the paper's, for the scale "paper".
      nominal_width: of one expert, relative to a standard FFN.
      balance: factors of the balance terms, by name.
      expert_groups: the D of the device balance term.
      first_k_dense_replace: leading layers with a dense FFN, of relative width nominal_dense_width.
      moe_intermediate_size, intermediate_size: the widths of the released model where they are
        known, for the scale "paper"; None rounds the nominal ones.
      flops_at_released_width: whether the paper's FLOPs are at the released widths instead of the
        nominal ones (found by comparing digits: 145B and 142B).
      beside: the settings of the mixture that a dense model is compared with: below the paper's
        scale it is as many times as wide and as deep as that; None is the same width and depth.
      queries: with latent attention, the latent of the queries in head sizes, 0 for none; None is
        grouped attention.  Sizes of its heads and of the latent of keys and values: `latent`.
      changes: other keys of the config by dotted name, at every scale.
      released: those that only the scale "paper" has: what was added or chosen for its size.
      width_percent: hidden size, in per cent of the scale's; see `resized`.
      steps_percent: steps and warm-up, in per cent of the scale's.
    """

    name: str
    settings: Settings
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    nominal_width: float
    router: str = "topk"
    balance: FrozenDict[str, float] = FrozenDict(expert=0.01)
    expert_groups: int = 1
    first_k_dense_replace: int = 0
    nominal_dense_width: float = 1.0
    moe_intermediate_size: int | None = None
    intermediate_size: int | None = None
    flops_at_released_width: bool = False
    beside: Settings | None = None
    queries: int | None = None
    changes: FrozenDict[str, Any] = FrozenDict()
    released: FrozenDict[str, Any] = FrozenDict()
    width_percent: int = 100
    steps_percent: int = 100


def parse(arg: str, **options: int) -> tuple[str, dict[str, int]]:
    """Splits a config argument such as "demo,shared=2" into a scale and whole-number options.

    Args:
      arg: the part after the colon of `--config=configs/FILE.py:ARG`.
      **options: of the config file, with their defaults.

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
    scale = Scale(setup.settings) if name == "paper" else _small(setup, SMALL[name])
    settings = resized(scale.settings, setup.width_percent, setup.steps_percent)
    scale = dataclasses.replace(scale, settings=settings)
    changes = {**setup.changes, **(setup.released if name == "paper" else {})}
    return to_config_dict(replace(_config(setup, scale, name), **changes))


def _config(setup: Setup, scale: Scale, name: str) -> Config:
    """The config of a model at a scale, without `Setup.changes`."""
    settings = scale.settings
    return Config(
        name=setup.name,
        scale=name,
        model=_model(setup, scale, at_paper_scale=name == "paper"),
        data=DataConfig(
            corpus=scale.corpus,
            sequence_length=settings.sequence_length,
            tokenizer_vocab_size=settings.tokenizer_vocab_size or settings.vocab_size,
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=settings.peak_learning_rate,
            warmup_steps=settings.warmup_steps,
            decay_at=settings.decay_at,
        ),
        train=TrainConfig(
            steps=settings.steps,
            global_batch_size=settings.global_batch_size,
            accumulation_steps=scale.accumulation_steps,
            log_every=scale.log_every,
            checkpoint_every=scale.checkpoint_every,
            eval_every=scale.eval_every,
            eval_batches=scale.eval_batches,
        ),
    )


def _small(setup: Setup, scale: Scale) -> Scale:
    """The scale with the model's width and depth relative to the mixture that it stands beside."""
    if setup.beside is None:
        return scale
    sizes = scale.settings
    wider = setup.settings.hidden_size / setup.beside.hidden_size
    deeper = setup.settings.num_hidden_layers / setup.beside.num_hidden_layers
    settings = dataclasses.replace(
        sizes,
        hidden_size=round(wider * sizes.hidden_size),
        num_attention_heads=round(wider * sizes.num_attention_heads),
        num_hidden_layers=round(deeper * sizes.num_hidden_layers),
    )
    return dataclasses.replace(scale, settings=settings)


def resized(sizes: Settings, width_percent: int, steps_percent: int) -> Settings:
    """Settings of a wider or narrower model, trained for more or fewer steps.

    The number of heads stays and their size grows with the width.  Initial deviation and learning
    rate go as width^-1/2, as from scale to scale in `SMALL`.  Warm-up keeps its share of the steps.

    Args:
      sizes: of the scale.
      width_percent: of the hidden size.
      steps_percent: of the steps.

    Raises:
      ValueError: for a width at which the heads have no even size, or no steps.
    """
    head_dim = sizes.head_dim * width_percent / 100
    hidden_size = sizes.hidden_size * width_percent / 100
    if width_percent < 1 or head_dim % 2 or hidden_size % 1:
        raise ValueError(
            f"width_percent={width_percent}: must give heads of an even size, they are"
            f" {sizes.head_dim} wide at 100"
        )
    if steps_percent < 1:
        raise ValueError(f"steps_percent={steps_percent}: must be at least 1")
    if width_percent == steps_percent == 100:
        return sizes
    rescaled = (100 / width_percent) ** 0.5
    return dataclasses.replace(
        sizes,
        hidden_size=round(hidden_size),
        head_dim=round(head_dim),
        initializer_range=sizes.initializer_range * rescaled,
        peak_learning_rate=sizes.peak_learning_rate * rescaled,
        steps=max(round(sizes.steps * steps_percent / 100), 1),
        warmup_steps=max(round(sizes.warmup_steps * steps_percent / 100), 1),
    )


def _model(setup: Setup, scale: Scale, *, at_paper_scale: bool) -> ModelConfig:
    sizes = scale.settings
    widths = _widths(setup, sizes, at_paper_scale=at_paper_scale)
    return ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        # A shallow model has one dense layer where a deep one has three.
        first_k_dense_replace=setup.first_k_dense_replace
        if at_paper_scale
        else min(setup.first_k_dense_replace, 1),
        intermediate_size=widths.dense,
        nominal_dense_width=widths.nominal_dense,
        initializer_range=sizes.initializer_range,
        remat=scale.remat,
        attention=_attention(setup, sizes),
        moe=MoEConfig(
            n_routed_experts=setup.n_routed_experts,
            n_shared_experts=setup.n_shared_experts,
            num_experts_per_tok=setup.num_experts_per_tok,
            moe_intermediate_size=widths.expert,
            nominal_width=widths.nominal,
            router=RouterConfig(name=setup.router),
            balance=FrozenDict(
                {name: BalanceTerm(factor) for name, factor in setup.balance.items()}
            ),
            expert_groups=setup.expert_groups,
        ),
    )


def _attention(setup: Setup, sizes: Settings) -> AttentionConfig:
    heads = AttentionConfig(
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=_key_value_heads(setup, sizes),
        head_dim=sizes.head_dim,
    )
    if setup.queries is None:
        return heads
    return dataclasses.replace(
        heads, name="latent", rope_interleaved=True, options=latent(setup.queries, sizes.head_dim)
    )


def latent(queries: int, head_dim: int) -> FrozenDict[str, int]:
    """Sizes of latent attention; those of V2 and V3 where the size of a head is 128.

    Args:
      queries: latent of the queries, in head sizes.
      head_dim: of a value, and of a query or key without its rotated part.
    """
    return FrozenDict(
        q_lora_rank=queries * head_dim,
        kv_lora_rank=4 * head_dim,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
    )


class _Widths(NamedTuple):
    """Widths of an expert and of a leading dense FFN; nominal ones relative to a standard FFN."""

    expert: int
    dense: int
    nominal: float
    nominal_dense: float


def _widths(setup: Setup, sizes: Settings, *, at_paper_scale: bool) -> _Widths:
    standard = 8 * sizes.hidden_size / 3
    expert = round(setup.nominal_width * standard)
    dense = round(setup.nominal_dense_width * standard)
    if at_paper_scale:
        expert = setup.moe_intermediate_size or expert
        dense = setup.intermediate_size or dense
        if setup.flops_at_released_width:
            return _Widths(expert, dense, expert / standard, dense / standard)
    return _Widths(expert, dense, setup.nominal_width, setup.nominal_dense_width)


def _key_value_heads(setup: Setup, sizes: Settings) -> int:
    """Number of key/value heads: the query heads, or with grouped queries the paper's share."""
    paper = setup.settings
    if paper.num_key_value_heads is None:
        return sizes.num_attention_heads
    share = paper.num_attention_heads // paper.num_key_value_heads
    return max(sizes.num_attention_heads // share, 1)

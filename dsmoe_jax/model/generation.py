"""Continues prompts with a KV cache: one prefill, then a token of every text at a time.

Prompts of one batch may differ in length.  Shorter ones get padding on the left, so that all texts
go on at the same place of the cache; padding is seen by no token and sent to no expert, and
positions count from a text's first token.  So each text is the one it would be alone.

The loop over tokens is compiled once, whatever number of tokens one call of it adds, and stops
when all texts have ended.

Shapes: B texts, P tokens of the longest prompt, G generated tokens at most, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.model.sampling import GREEDY, Sampling, sample
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import Cache, ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.routers import get_router, task_number

# Tokens of each text that one call adds, unless every one is wanted at once.
CHUNK = 32

Prompts = Sequence[Sequence[int]] | np.ndarray | jax.Array
Watch = Callable[[list[list[int]]], np.ndarray]


class Seconds(NamedTuple):
    """Times of a generation: compiling, reading the prompts (first tokens included), the rest."""

    compile: float
    prefill: float
    decode: float


class Generated(NamedTuple):
    """Continuations of B prompts.

    Attributes:
      tokens_BG: int32; what stands after the end of a text is 0.
      n_tokens_B: int32, the tokens of each text, an end-of-text included.
      passes: of the model over new tokens, the prompts not counted.
      prompt_tokens: of all texts together, without padding.
      seconds: that it took.
    """

    tokens_BG: np.ndarray
    n_tokens_B: np.ndarray
    passes: int
    prompt_tokens: int
    seconds: Seconds

    @property
    def decoded_tokens(self) -> int:
        """Tokens that the decode steps generated: all but the first of each text."""
        return int(self.n_tokens_B.sum()) - len(self.n_tokens_B)


class _Plan(NamedTuple):
    """Settings that the compiled programs are made for."""

    max_new_tokens: int
    sampling: Sampling


class _Given(NamedTuple):
    """Inputs of every step that do not change.

    Attributes:
      keys_B: a random key for each text.
      allowed_V: bool, the tokens that may be generated.
      eos_id: int32, the token that ends a text; -1: none.
      task_id: int32, the task of all texts; None for a router that does not choose by it.
    """

    keys_B: jax.Array
    allowed_V: jax.Array
    eos_id: jax.Array
    task_id: jax.Array | None


class _UnderWay(NamedTuple):
    """Texts under way.

    Attributes:
      cache: of all tokens but the last.
      token_B: int32, the last token of each text, after its end too.
      n: int32, tokens generated so far.
      n_finite: int32, how many of them came from finite logits.
      tokens_BG: int32, those tokens; 0 after the end of a text, and where there is none yet.
      n_tokens_B: int32, the tokens of each text, at most n.
      ended_B: bool, the texts that have ended.
      seen_BV: bool, the tokens in each text, prompt included; None without a repetition penalty.
    """

    cache: Cache
    token_B: jax.Array
    n: jax.Array
    n_finite: jax.Array
    tokens_BG: jax.Array
    n_tokens_B: jax.Array
    ended_B: jax.Array
    seen_BV: jax.Array | None


def generate(
    model: Transformer,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    allowed_V: np.ndarray | None = None,
    eos_id: int | None = None,
    watch: Watch | None = None,
    chunk: int = CHUNK,
    task: str | None = None,
) -> Generated:
    """Continues prompts, each as if it were alone: see `interventions.GENERATION`.

    Args:
      model: trained.
      prompts: token ids of each text, at least one; texts may differ in length.
      max_new_tokens: G.
      sampling: how tokens are drawn; greedy if not given.
      seed: of the random choices.
      sample_ids: of each text; texts of equal prompt, seed and number are the same.  None: 0, 1, 2,
        ...
      allowed_V: bool, the tokens that may be generated; None: all of the model's.
      eos_id: the token that ends a text; None: none does.
      watch: called after every `chunk` tokens with the new tokens of each text (none of a text that
        has ended); it returns bool (B,), the texts that are to end here.
      chunk: tokens of each text between two calls.
      task: of all texts, for a router by task.

    Raises:
      ValueError: naming the argument that is out of range or takes too much memory, or the token
        whose logits are not finite.
    """
    v = model.config.vocab_size
    allowed_V = np.ones(v, bool) if allowed_V is None else np.asarray(allowed_V, bool)
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be > 0")
    require(chunk > 0, "chunk", chunk, "must be > 0")
    require(allowed_V.shape == (v,), "allowed", allowed_V.shape, f"must be of shape {(v,)}")
    require(bool(allowed_V.any()), "allowed", "none", "must allow a token")
    inputs = prompt_inputs(prompts, v, task_number(model.config.moe, task, "task"))
    b, p = inputs.tokens_BS.shape
    ids_B = jnp.arange(b) if sample_ids is None else jnp.asarray(sample_ids)
    require(ids_B.shape == (b,), "sample_ids", ids_B.shape, f"must be of shape {(b,)}")
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids_B)
    task_id = None if inputs.task_ids_BS is None else inputs.task_ids_BS[0, 0]
    eos = jnp.int32(-1 if eos_id is None else eos_id)
    given = _Given(keys_B, jnp.asarray(allowed_V), eos, task_id)
    try:
        return _run(model, _Plan(max_new_tokens, sampling), inputs, given, watch, chunk)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the memory is not enough for the keys and values of"
            f" {b} x {p + max_new_tokens} tokens; must be less"
        ) from error


def routing_notes(moe: MoEConfig) -> list[str]:
    """Sentences on what is routed otherwise than in training and evaluation."""
    if not moe.n_routed_experts:
        return []
    router, settings = get_router(moe)
    notes = []
    if router.competes or router.alone is not None:
        experts = "one expert" if settings.k == 1 else f"{settings.k} experts"
        notes.append(
            f"note: in training the {moe.router.name} router routes the tokens of a batch together;"
            f" here each token goes to {experts} of its own"
        )
    if moe.evaluation_drop is not None:
        notes.append(
            "note: nothing is dropped here, whatever model.moe.evaluation_drop does in evaluation"
        )
    return notes


def prompt_inputs(prompts: Prompts, vocab_size: int, task_id: int | None = None) -> ModelInputs:
    """One batch of prompts, shorter ones with padding before them.

    Args:
      prompts: token ids of each text, at least one.
      vocab_size: ids that the model has.
      task_id: number of the task of all texts, for a router by task.

    Raises:
      ValueError: for no prompt, an empty one, or ids that the model does not have.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    shapes = [row.shape for row in rows]
    some = bool(rows) and all(row.ndim == 1 and row.size for row in rows)
    require(some, "prompts", shapes, "must be token ids, at least one of each text")
    for row in rows:
        require(np.issubdtype(row.dtype, np.integer), "prompts", row.dtype, "must be ids")
        ends = int(row.min()), int(row.max())
        known = ends[0] >= 0 and ends[1] < vocab_size
        require(known, "prompts", ends, f"smallest and largest id; must be 0 to {vocab_size - 1}")
    p = max(map(len, rows))
    tokens_BP = np.zeros((len(rows), p), np.int32)
    segment_ids_BP = np.zeros_like(tokens_BP)
    for i, row in enumerate(rows):
        # Padding, whose weight is 0, must be finite: 0 x NaN is NaN.  So it is a token of the text.
        tokens_BP[i, : p - len(row)] = row[0]
        tokens_BP[i, p - len(row) :] = row
        segment_ids_BP[i, p - len(row) :] = 1
    inputs = ModelInputs(jnp.asarray(tokens_BP), jnp.asarray(segment_ids_BP))
    return inputs.of_task(task_id)


def _run(
    model: Transformer,
    plan: _Plan,
    inputs: ModelInputs,
    given: _Given,
    watch: Watch | None,
    chunk: int,
) -> Generated:
    """Prefill and chunks of decode steps; between them the texts' reader says which ones end."""
    graph, state = nnx.split(model)
    way, seconds = _begin(graph, plan, state, inputs, given)
    reached = 0
    while True:
        _check_finite(way)
        start, reached = reached, int(way.n)
        if watch is not None:
            stopped_B = watch(_new_tokens(way, start, reached))
            way = way._replace(ended_B=way.ended_B | jnp.asarray(stopped_B))
        if reached == plan.max_new_tokens or bool(way.ended_B.all()):
            break
        until = jnp.int32(min(reached + chunk, plan.max_new_tokens))
        begun = time.perf_counter()
        way = jax.block_until_ready(_decode(graph, plan, state, given, way, until))
        seconds = seconds._replace(decode=seconds.decode + time.perf_counter() - begun)
    assert inputs.segment_ids_BS is not None
    prompt_tokens = int(inputs.segment_ids_BS.sum())
    tokens_BG, n_tokens_B = np.asarray(way.tokens_BG), np.asarray(way.n_tokens_B)
    return Generated(tokens_BG, n_tokens_B, reached - 1, prompt_tokens, seconds)


def _begin(
    graph: nnx.GraphDef, plan: _Plan, state: nnx.State, inputs: ModelInputs, given: _Given
) -> tuple[_UnderWay, Seconds]:
    """The texts after their first token, all programs compiled, and the times of both."""
    start = time.perf_counter()
    prefill = _prefill.lower(graph, plan, state, inputs, given).compile()
    compiled = time.perf_counter()
    way = jax.block_until_ready(prefill(state, inputs, given))
    filled = time.perf_counter()
    # Calls without a step compile the loop.  On a mesh the first result may be split otherwise
    # than what prefill returns, so the second call is the one that all others are like.
    for _ in range(2):
        way = jax.block_until_ready(_decode(graph, plan, state, given, way, jnp.int32(0)))
    ready = time.perf_counter()
    return way, Seconds(compiled - start + ready - filled, filled - compiled, 0.0)


def _check_finite(way: _UnderWay) -> None:
    """Refuses tokens that no finite logits have chosen."""
    if (n := int(way.n_finite)) < int(way.n):
        raise ValueError(
            f"logits of generated token {n + 1}: not finite; the model's training diverged or its"
            " parameters are damaged; an earlier checkpoint may be sound"
        )


def _new_tokens(way: _UnderWay, start: int, end: int) -> list[list[int]]:
    """The tokens of each text from one place of the generated ones to another, or to its end."""
    tokens_BG, n_tokens_B = np.asarray(way.tokens_BG), np.asarray(way.n_tokens_B)
    return [row[start : min(end, n)].tolist() for row, n in zip(tokens_BG, n_tokens_B, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: nnx.GraphDef, plan: _Plan, state: nnx.State, inputs: ModelInputs, given: _Given
) -> _UnderWay:
    """The texts after their first token."""
    model: Transformer = nnx.merge(graph, state)
    b, p = inputs.tokens_BS.shape
    g = plan.max_new_tokens
    # The last token is never read, so it needs no place.
    empty = model.empty_cache(b, p + g - 1)
    hidden_BPD, _, cache = model.hidden(inputs, empty, interventions.GENERATION)
    seen_BV = None
    if plan.sampling.repetition_penalty != 1.0:
        assert inputs.segment_ids_BS is not None
        seen_BV = jnp.zeros((b, model.config.vocab_size), bool)
        is_token_BP = inputs.segment_ids_BS > 0
        seen_BV = seen_BV.at[jnp.arange(b)[:, None], inputs.tokens_BS].max(is_token_BP)
    assert cache is not None
    way = _UnderWay(
        cache=cache,
        token_B=jnp.zeros(b, jnp.int32),
        n=jnp.int32(0),
        n_finite=jnp.int32(0),
        tokens_BG=jnp.zeros((b, g), jnp.int32),
        n_tokens_B=jnp.zeros(b, jnp.int32),
        ended_B=jnp.zeros(b, bool),
        seen_BV=seen_BV,
    )
    # The logits of all positions would be as large as P of a step.
    logits_BV = model.logits(hidden_BPD[:, -1:])[:, 0]
    return _with_token(way, logits_BV, given, plan)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(
    graph: nnx.GraphDef,
    plan: _Plan,
    state: nnx.State,
    given: _Given,
    way: _UnderWay,
    until: jax.Array,
) -> _UnderWay:
    """The texts with `until` tokens, or fewer if all have ended."""
    model: Transformer = nnx.merge(graph, state)

    def goes_on(way: _UnderWay) -> jax.Array:
        return (way.n < until) & ~way.ended_B.all()

    def step(way: _UnderWay) -> _UnderWay:
        # Of a text that has ended the tokens are padding: no expert computes them.
        alive_B1 = (~way.ended_B).astype(jnp.int32)[:, None]
        inputs = ModelInputs(way.token_B[:, None], alive_B1).of_task(given.task_id)
        output = model.forward(inputs, way.cache, interventions.GENERATION)
        assert output.cache is not None
        way = way._replace(cache=output.cache)
        return _with_token(way, output.logits_BSV[:, -1], given, plan)

    return jax.lax.while_loop(goes_on, step, way)


def _with_token(way: _UnderWay, logits_BV: jax.Array, given: _Given, plan: _Plan) -> _UnderWay:
    """The texts with one more token, but for those that have ended."""
    alive_B = ~way.ended_B
    allowed_V = given.allowed_V
    finite = (jnp.isfinite(logits_BV) | ~allowed_V | way.ended_B[:, None]).all()
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(given.keys_B, way.n)
    token_B = sample(logits_BV, keys_B, plan.sampling, way.seen_BV)
    token_B = jnp.where(alive_B, token_B, way.token_B)
    new_B1 = jnp.where(alive_B, token_B, 0)[:, None]
    seen_BV = way.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].max(alive_B)
    return _UnderWay(
        cache=way.cache,
        token_B=token_B,
        n=way.n + 1,
        # It stops to count at the first token that is not.
        n_finite=way.n_finite + (finite & (way.n_finite == way.n)),
        tokens_BG=jax.lax.dynamic_update_slice(way.tokens_BG, new_B1, (0, way.n)),
        n_tokens_B=way.n_tokens_B + alive_B,
        ended_B=way.ended_B | (token_B == given.eos_id),
        seen_BV=seen_BV,
    )

"""Greedy generation with the modules of multi-token prediction as a draft (V3 section 5.4.3).

Each pass of the model looks at the last token and at one drafted token for each module.  Drafted
tokens are kept up to the first one that is not what the model finds best; behind them comes the
model's own.  So the tokens are those of plain greedy generation, in fewer passes.  (Logits of
several positions at once may round otherwise than those of one: two tokens that are best within
that rounding may change places.)

All sequences of a batch keep as many tokens as the one that agrees least: the cache has one length.

Module k needs the token k ahead.  At the last positions that is a draft, so what its cache has
there is computed again when the tokens are known: each pass runs the modules over a window.

Shapes: B prompts, P the longest, G generated tokens, S positions of a pass, L positions of the
buffers, D hidden, V vocabulary, K modules.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config.checks import require
from dsmoe_jax.model.generation import Prompts, Seconds, prompt_inputs
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import Cache, ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.routers import task_number


class Drafted(NamedTuple):
    """Results of generation with a draft.

    Attributes:
      tokens_BG: int32, those of plain greedy generation.
      passes: of the model over new tokens, the prompt's not counted.
      proposed: drafted tokens of each module, all sequences together, (K,).
      accepted: those that the model found best too, up to the first that it did not, (K,).
      prompt_tokens: of all texts together, without padding.
      seconds: that it took.
    """

    tokens_BG: np.ndarray
    passes: int
    proposed: np.ndarray
    accepted: np.ndarray
    prompt_tokens: int
    seconds: Seconds

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted; None if there was none."""
        total = int(self.proposed.sum())
        return int(self.accepted.sum()) / total if total else None


class _State(NamedTuple):
    """The state that a pass changes.

    Attributes:
      tokens_BL: known tokens, then drafted ones.
      segment_ids_BL: int32, 0 where padding stands before a shorter prompt, else 1.
      last: int32, position of the last known token, which the model has not seen.
      hidden_BLD: the model's representation of the positions before it.
      cache: of the model.
      draft_cache: of the modules.
      passes, proposed, accepted: so far.
      finite: whether all logits were.
      task_id: of all texts; None for a router that does not choose by it.
    """

    tokens_BL: jax.Array
    segment_ids_BL: jax.Array
    last: jax.Array
    hidden_BLD: jax.Array
    cache: Cache
    draft_cache: Cache
    passes: jax.Array
    proposed: jax.Array
    accepted: jax.Array
    finite: jax.Array
    task_id: jax.Array | None


def generate_drafted(
    model: Transformer,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    allowed_V: np.ndarray | None = None,
    task: str | None = None,
) -> Drafted:
    """Continues prompts greedily, each as if it were alone.

    Args:
      model: trained with `model.mtp`.
      prompts: token ids of each text, at least one; texts may differ in length.
      max_new_tokens: G.
      allowed_V: bool, the tokens that may be generated; None: all of the model's.
      task: of all texts, for a router by task.

    Raises:
      ValueError: for a model without modules, an argument out of range, or logits that are not
        finite.
    """
    require(
        model.config.mtp is not None,
        "model.mtp",
        None,
        "there is no draft without modules of multi-token prediction; train with model.mtp",
    )
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be > 0")
    v = model.config.vocab_size
    allowed_V = np.ones(v, bool) if allowed_V is None else np.asarray(allowed_V, bool)
    inputs = prompt_inputs(prompts, v, task_number(model.config.moe, task, "task"))
    done, seconds = _run(model, inputs, jnp.asarray(allowed_V), max_new_tokens)
    if not done.finite:
        raise ValueError(
            "logits of a generated token: not finite; the model's training diverged or its"
            " parameters are damaged; an earlier checkpoint may be sound"
        )
    assert inputs.segment_ids_BS is not None
    p = inputs.tokens_BS.shape[1]
    return Drafted(
        np.asarray(done.tokens_BL)[:, p : p + max_new_tokens],
        int(done.passes),
        np.asarray(done.proposed),
        np.asarray(done.accepted),
        int(inputs.segment_ids_BS.sum()),
        seconds,
    )


def _run(
    model: Transformer, inputs: ModelInputs, allowed_V: jax.Array, max_new_tokens: int
) -> tuple[_State, Seconds]:
    """The texts when all tokens are known, and the times."""
    graph, state = nnx.split(model)
    start = time.perf_counter()
    read = _read.lower(graph, max_new_tokens, state, inputs, allowed_V).compile()
    compiled = time.perf_counter()
    first = jax.block_until_ready(read(state, inputs, allowed_V))
    filled = time.perf_counter()
    last = jnp.int32(inputs.tokens_BS.shape[1] + max_new_tokens - 1)
    go_on = _go_on.lower(graph, state, allowed_V, first, last).compile()
    ready = time.perf_counter()
    done = jax.block_until_ready(go_on(state, allowed_V, first, last))
    compiling = compiled - start + ready - filled
    return done, Seconds(compiling, filled - compiled, time.perf_counter() - ready)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(graph, max_new_tokens: int, state, inputs: ModelInputs, allowed_V) -> _State:
    """The texts behind their prompts."""
    return _Drafting(nnx.merge(graph, state), allowed_V).prompt(inputs, max_new_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _go_on(graph, state, allowed_V, first: _State, last: jax.Array) -> _State:
    """The texts whose last token stands at `last`, or behind."""
    run = _Drafting(nnx.merge(graph, state), allowed_V)
    return jax.lax.while_loop(lambda state: state.last < last, run.one_pass, first)


class _Drafting:
    """The steps of the loop.

    Args:
      model: with modules.
      allowed_V: bool, tokens that may be generated.
    """

    def __init__(self, model: Transformer, allowed_V: jax.Array):
        self._model = model
        self._allowed_V = allowed_V
        self._depth = model.config.mtp_depth
        # A pass adds up to K + 1 positions.  If it adds fewer, module k has used tokens that were
        # not kept at up to k positions before the last one.
        self._window = self._depth + 1

    def prompt(self, inputs: ModelInputs, max_new_tokens: int) -> _State:
        """The state behind a prompt: its next token is known, and K more are drafted."""
        prompt_BP = inputs.tokens_BS
        b, p = prompt_BP.shape
        # The last pass may go beyond the end; the window may be longer than what there is.
        length = max(p + max_new_tokens, self._window) + self._depth + 1
        cache = self._model.empty_cache(b, length)
        hidden_BSD, best_BS, cache, finite = self._look(inputs, cache)
        tokens_BL = jnp.zeros((b, length), jnp.int32)
        tokens_BL = tokens_BL.at[:, :p].set(prompt_BP).at[:, p].set(best_BS[:, -1])
        hidden_BLD = jnp.zeros((b, length, hidden_BSD.shape[-1]), hidden_BSD.dtype)
        assert inputs.segment_ids_BS is not None
        segment_ids_BL = jnp.ones_like(tokens_BL).at[:, :p].set(inputs.segment_ids_BS)
        none = jnp.zeros(self._depth, jnp.int32)
        state = _State(
            tokens_BL,
            segment_ids_BL,
            jnp.int32(p),
            hidden_BLD.at[:, :p].set(hidden_BSD),
            cache,
            self._model.empty_draft_cache(b, length),
            jnp.int32(0),
            none,
            none,
            finite,
            None if inputs.task_ids_BS is None else inputs.task_ids_BS[0, 0],
        )
        return self._draft(state, 0, max(p, self._window))

    def one_pass(self, state: _State) -> _State:
        """Verifies the drafted tokens and drafts new ones."""
        b = len(state.tokens_BL)
        seen_BS = jax.lax.dynamic_slice_in_dim(state.tokens_BL, state.last, self._depth + 1, axis=1)
        seen = ModelInputs(seen_BS).of_task(state.task_id)
        hidden_BSD, best_BS, cache, finite = self._look(seen, state.cache)
        agrees_BK = jnp.cumprod(seen_BS[:, 1:] == best_BS[:, :-1], axis=1)
        kept = agrees_BK.min(axis=0).sum()  # of all sequences
        behind = state.last + 1
        state = state._replace(
            tokens_BL=jax.lax.dynamic_update_slice(state.tokens_BL, best_BS, (0, behind)),
            last=behind + kept,
            hidden_BLD=jax.lax.dynamic_update_slice(
                state.hidden_BLD, hidden_BSD, (0, state.last, 0)
            ),
            cache=cache._replace(length=behind + kept),
            passes=state.passes + 1,
            proposed=state.proposed + b,
            accepted=state.accepted + agrees_BK.sum(axis=0, dtype=jnp.int32),
            finite=state.finite & finite,
        )
        return self._draft(state, jnp.maximum(state.last - self._window, 0), self._window)

    def _look(
        self, inputs: ModelInputs, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache, jax.Array]:
        """The model on tokens: representation, best next tokens, cache, whether all was finite."""
        hidden_BSD, _, updated = self._model.hidden(inputs, cache, interventions.GENERATION)
        assert updated is not None
        best_BS, finite = self._best(hidden_BSD)
        return hidden_BSD, best_BS, updated, finite

    def _best(self, hidden_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BSV = self._model.logits(hidden_BSD)
        finite = (jnp.isfinite(logits_BSV) | ~self._allowed_V).all()
        allowed_BSV = jnp.where(self._allowed_V, logits_BSV, -jnp.inf)
        return jnp.argmax(allowed_BSV, axis=-1).astype(jnp.int32), finite

    def _draft(self, state: _State, first: Any, length: int) -> _State:
        """Runs the modules over `length` positions from `first` on, the last known one included.

        Behind the last position that the model has seen they compute nothing of use, and it is
        written over before it is read.
        """
        tokens_BL = state.tokens_BL
        hidden_BSD = jax.lax.dynamic_slice_in_dim(state.hidden_BLD, first, length, axis=1)
        ids_BS = jax.lax.dynamic_slice_in_dim(state.segment_ids_BL, first, length, axis=1)
        at = state.last - 1 - first  # place of the last position with a representation
        cache = state.draft_cache._replace(length=jnp.int32(first))
        for k in range(1, self._depth + 1):
            next_BS = jax.lax.dynamic_slice_in_dim(tokens_BL, first + k, length, axis=1)
            following = ModelInputs(next_BS, ids_BS).of_task(state.task_id)
            hidden_BSD, cache = self._model.draft(k, hidden_BSD, following, cache)
            last_B1D = jax.lax.dynamic_slice_in_dim(hidden_BSD, at, 1, axis=1)
            best_B1, _ = self._best(last_B1D)
            tokens_BL = jax.lax.dynamic_update_slice(tokens_BL, best_B1, (0, state.last + k))
        return state._replace(tokens_BL=tokens_BL, draft_cache=cache)

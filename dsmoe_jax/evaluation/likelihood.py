"""Log-likelihoods of continuations: how likely a model finds each possible answer.

A request is tokenised as the lm-evaluation-harness does it.  White space at the end of the context
belongs to the continuation, and the continuation has the tokens of the whole text that come after
as many as the context alone has.  An end-of-text token comes first, as before every document that
the model was trained on.

Requests are sorted into a few lengths, so that few programs are compiled, and no request depends on
the others of its batch: see `interventions.GENERATION`.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config.checks import require
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.routers import task_number
from dsmoe_jax.parallel import sharding

SHORTEST = 32  # positions; the other lengths are twice the one before


class Request(NamedTuple):
    """A text, the one after it whose likelihood is asked for, and where it is from, for errors."""

    context: str
    continuation: str
    place: str = ""


class Encoded(NamedTuple):
    """Tokens of a request; those of the context begin with end-of-text."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.context) + len(self.continuation) - 1


class Likelihood(NamedTuple):
    """Likelihood of a continuation.

    Attributes:
      nats: its log-likelihood, summed over its tokens.
      greedy: whether each of its tokens is the one that the model finds best.
    """

    nats: float
    greedy: bool


def encode(tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Encoded]:
    """Tokens of requests.

    Raises:
      ValueError: naming the request, if its continuation makes one token with the end of its
        context, or is empty.
    """
    split = [_before_white_space(request) for request in requests]
    wholes = tokenizer.encode_batch([context + rest for context, rest in split])
    contexts = tokenizer.encode_batch([context for context, _ in split])
    found = []
    for request, whole, context in zip(requests, wholes, contexts, strict=True):
        continuation = tuple(whole[len(context) :])
        if not continuation:
            place = request.place or repr(request.continuation)
            raise ValueError(
                f"{place}: a continuation has no token of its own after its context; let it begin"
                " with a blank"
            )
        found.append(Encoded((tokenizer.eos_id, *context), continuation))
    return found


def _before_white_space(request: Request) -> tuple[str, str]:
    """Context and continuation, with the white space between them in the continuation."""
    context = request.context.rstrip()
    return context, request.context[len(context) :] + request.continuation


def windows(request: Encoded, max_length: int) -> list[Encoded]:
    """A request as requests that a model reads at once.

    Of a context that is too long the beginning is cut off.  A continuation that is too long is cut
    into parts: each token is predicted once, after as much of the text as fits.

    Args:
      request: without a token to predict it has no window.
      max_length: positions that the model reads at once.
    """
    tokens = request.context + request.continuation
    found = []
    start = len(request.context)
    while start < len(tokens):
        end = min(start + max_length, len(tokens))
        first = max(0, end - max_length - 1)
        found.append(Encoded(tokens[first:start], tokens[start:end]))
        start = end
    return found


def different_windows(requests: Iterable[Encoded], max_length: int) -> list[Encoded]:
    """The windows of all requests, each once."""
    return list(dict.fromkeys(w for request in requests for w in windows(request, max_length)))


class Scorer:
    """A model that gives likelihoods.

    Args:
      model: trained.
      max_length: positions that it reads at once, see `windows`.
      batch_size: sequences of this length at once; of shorter ones there are more.
      task: of all requests, for a router by task.

    Raises:
      ValueError: for a length or batch size out of range, and a task that is missing or unknown.
    """

    def __init__(
        self,
        model: Transformer,
        max_length: int,
        batch_size: int = 16,
        task: str | None = None,
    ):
        task_id = task_number(model.config.moe, task, "task")
        require(max_length > 0, "max_length", max_length, "must be > 0")
        require(batch_size > 0, "batch_size", batch_size, "must be > 0")
        self.max_length = max_length
        self._batch_size = batch_size
        graph, self._params, self._other = nnx.split(model, nnx.Param, ...)

        def step(params: nnx.State, other: nnx.State, batch: dict[str, jax.Array]):
            model = nnx.merge(graph, params, other)
            targets_BS = batch["targets_BS"]
            counts_BS = batch["counts_BS"]
            inputs = ModelInputs(batch["tokens_BS"], batch["segment_ids_BS"]).of_task(task_id)
            scored = model.score(inputs, targets_BS, interventions.GENERATION, with_best=True)
            nats_B = -jnp.where(counts_BS, scored.nll_BS, 0.0).sum(axis=1)
            greedy_B = ((scored.best_BS == targets_BS) | ~counts_BS).all(axis=1)
            return nats_B, greedy_B

        self._step = jax.jit(step, out_shardings=sharding.whole())

    def score(
        self, requests: Sequence[Encoded], on_batch: Callable[[int], None] = lambda done: None
    ) -> list[Likelihood]:
        """Likelihoods of continuations, in the order of the requests.

        Args:
          requests: the same one may come several times; it is computed once.
          on_batch: called with the number of different windows done.

        Raises:
          ValueError: for a likelihood that is not finite.
        """
        found: dict[Encoded, Likelihood] = {}
        for length, same_length in self._by_length(requests).items():
            n_rows = self._batch_size * (self.max_length // length)
            for start in range(0, len(same_length), n_rows):
                batch = same_length[start : start + n_rows]
                found |= zip(batch, self._likelihoods(batch, length, n_rows), strict=True)
                on_batch(len(found))
        return [
            _joined([found[window] for window in windows(request, self.max_length)])
            for request in requests
        ]

    def _by_length(self, requests: Sequence[Encoded]) -> dict[int, list[Encoded]]:
        """The different windows by the length that they are filled up to, longest first."""
        found: dict[int, list[Encoded]] = defaultdict(list)
        for window in different_windows(requests, self.max_length):
            found[self._length(window.positions)].append(window)
        return dict(sorted(found.items(), reverse=True))

    def _length(self, positions: int) -> int:
        """The least of the few lengths that has room, at most `max_length`."""
        doublings = max(0, math.ceil(math.log2(positions / SHORTEST)))
        return min(SHORTEST << doublings, self.max_length)

    def _likelihoods(
        self, requests: Sequence[Encoded], length: int, n_rows: int
    ) -> list[Likelihood]:
        """Likelihoods of the requests of one batch."""
        rows = [_row(request, length) for request in requests]
        rows += rows[-1:] * (n_rows - len(rows))
        local = sharding.local_rows(n_rows)
        batch = {name: np.stack([rows[i][name] for i in local]) for name in rows[0]}
        batch = sharding.global_batch(batch, local, n_rows)
        nats_B, greedy_B = jax.device_get(self._step(self._params, self._other, batch))
        if not np.isfinite(nats_B).all():
            raise ValueError(
                "log-likelihood: not finite; the model's training diverged or its parameters are"
                " damaged; an earlier checkpoint may be sound"
            )
        pairs = zip(nats_B.tolist(), greedy_B.tolist(), strict=True)
        return [Likelihood(*pair) for pair in pairs][: len(requests)]


def _joined(parts: Sequence[Likelihood]) -> Likelihood:
    """The likelihood of a continuation from those of its parts."""
    return Likelihood(sum(part.nats for part in parts), all(part.greedy for part in parts))


def _row(request: Encoded, length: int) -> dict[str, np.ndarray]:
    """The arrays of a request in a batch, (S,): its positions, then padding."""
    tokens = request.context + request.continuation
    end = request.positions
    row = {
        "tokens_BS": np.zeros(length, np.int32),
        "targets_BS": np.zeros(length, np.int32),
        "segment_ids_BS": np.zeros(length, np.int32),
        "counts_BS": np.zeros(length, bool),
    }
    row["tokens_BS"][:end] = tokens[:-1]
    row["targets_BS"][:end] = tokens[1:]
    row["segment_ids_BS"][:end] = 1
    row["counts_BS"][end - len(request.continuation) : end] = True
    return row

"""A text and the experts that each of its tokens was sent to.

Shapes: T tokens of the text, L MoE layers, K columns of a routing, E routed experts, G domains;
B sequences of a batch, S their length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.analysis import specialisation
from dsmoe_jax.analysis.specialisation import Use
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.pipeline import Batch, validation_batches
from dsmoe_jax.evaluation.domain_load import gate_mass
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import experts, interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.nn.feed_forward import form_of
from dsmoe_jax.nn.quantisation import dequantise
from dsmoe_jax.parallel import sharding

SAMPLE = 256  # tokens on which outputs of the experts are compared
SAMPLED_SEQUENCES = 16


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """Tokens in reading order, sequence after sequence, without padding, with their routing.

    Attributes:
      token_ids_T: int32.
      sequence_T: int32, number of the sequence that a token stands in.
      position_T: int32, position in its document, as the model saw it.
      domain_T: int32, index in `domains`.
      ids_LTK: int32, the experts that computed the token; E is unassigned, or an identity expert.
      gates_LTK: float32, their gates; 0 for unassigned ones.
      n_experts: E.
      domains: names.
    """

    token_ids_T: np.ndarray
    sequence_T: np.ndarray
    position_T: np.ndarray
    domain_T: np.ndarray
    ids_LTK: np.ndarray
    gates_LTK: np.ndarray
    n_experts: int
    domains: Sequence[str]

    @property
    def n_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.ids_LTK)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.token_ids_T)

    def around(self, place: int, reach: int) -> tuple[list[int], list[int]]:
        """Token ids before and after a token, at most `reach` of each, of its own sequence."""
        near = np.arange(max(place - reach, 0), min(place + reach + 1, self.n_tokens))
        near = near[self.sequence_T[near] == self.sequence_T[place]]
        before, after = (self.token_ids_T[near[side]] for side in (near < place, near > place))
        return before.tolist(), after.tolist()

    def uses(self, layer: int, expert: int, n: int, *, apart: int = 1) -> list[Use]:
        """The tokens with the largest gates of an expert, see `specialisation.strongest_uses`.

        Raises:
          ValueError: if there is no such layer or expert.
        """
        require(0 <= layer < self.n_layers, "layer", layer, f"must be 0 to {self.n_layers - 1}")
        there = 0 <= expert < self.n_experts
        require(there, "expert", expert, f"must be 0 to {self.n_experts - 1}")
        of_layer = self.ids_LTK[layer], self.gates_LTK[layer]
        return specialisation.strongest_uses(*of_layer, expert, n, apart=apart)


def route_text(
    model: Transformer,
    corpus: Corpus,
    *,
    max_tokens: int,
    batch_size: int = 8,
    intervention: Intervention = interventions.NONE,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> RoutedText:
    """Runs a model over the beginning of the held-out text of its corpus.

    Domains are interleaved in the held-out text, so a part of it has all of them.

    Args:
      model: trained, with routed experts.
      corpus: prepared, in the tokens of the model.
      max_tokens: the text is cut there, if it does not end before.
      batch_size: sequences at once.
      intervention: a change to how the MoE layers are used.
      on_batch: called with the number of tokens so far.

    Raises:
      ValueError: as `check_routes`, and for less than one token.
    """
    check_routes(model.config)
    graph, params, other = nnx.split(model, nnx.Param, ...)
    held_out = HeldOut(
        graph,
        corpus,
        batch_size,
        intervention=intervention,
        keep_routing=True,
        tasks=model.config.moe.router.tasks,
    )
    routings = held_out.routings(params, other)
    n_experts = model.config.moe.n_routed_experts
    return with_routing(corpus, routings, n_experts, max_tokens=max_tokens, on_batch=on_batch)


def check_routes(config: ModelConfig) -> None:
    """Refuses a model whose experts tell nothing about it.

    Raises:
      ValueError: for a model without routed experts, or one that replays another's routing.
    """
    n = config.moe.n_routed_experts
    wrong = "a dense model routes nothing; must be > 0 to be analysed, by train.analyse_every too"
    require(n > 0, "model.moe.n_routed_experts", n, wrong)
    wrong = "replays the experts that another model chose; analyse that one"
    name = config.moe.router.name
    chooses = get_router(config.moe)[0].needs_recording != "routing"
    require(chooses, "model.moe.router.name", name, wrong)


def with_routing(
    corpus: Corpus,
    routings: Iterable[RecordedRouting],
    n_experts: int,
    *,
    max_tokens: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> RoutedText:
    """The beginning of a held-out text, with a routing that is known batch by batch.

    Args:
      corpus: prepared.
      routings: of its held-out batches in their order, (L, B, S, K); as many as needed are taken.
      n_experts: E.
      max_tokens: the text is cut there, if it does not end before.
      on_batch: called with the number of tokens so far.

    Raises:
      ValueError: for less than one token.
    """
    require(max_tokens > 0, "max_tokens", max_tokens, "must be > 0")
    parts = []
    tokens = n_sequences = 0
    batches: Iterator[Batch] | None = None
    for routing in routings:
        batch_size = routing.ids.shape[1]
        batches = batches or validation_batches(corpus.directory, batch_size)
        batch = next(batches)
        # Identity experts are choices of the router behind the E experts; they serve nothing.
        real_LBSK = routing.ids < n_experts
        ids_LBSK = np.where(real_LBSK, routing.ids, n_experts)
        gates_LBSK = np.where(real_LBSK, routing.gates, 0)
        part = _flat(batch, ids_LBSK, gates_LBSK, n_sequences)
        parts.append(part)
        n_sequences += batch_size
        tokens += len(part[0])
        on_batch(tokens)
        if tokens >= max_tokens:
            break
    flat, layers = zip(*((part[:4], part[4:]) for part in parts), strict=True)
    return RoutedText(
        *(np.concatenate(column)[:max_tokens] for column in zip(*flat, strict=True)),
        *(np.concatenate(column, axis=1)[:, :max_tokens] for column in zip(*layers, strict=True)),
        n_experts=n_experts,
        domains=tuple(corpus.domains),
    )


def use(model: Transformer, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Assignments to each expert on a text, and the sum of its gates, each (L, E).

    Args:
      model: trained, with routed experts.
      batches: the text.

    Raises:
      ValueError: as `check_routes`.
    """
    check_routes(model.config)
    n_experts = model.config.moe.n_routed_experts
    graph, state = nnx.split(model)

    def step(state: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        targets_BS = jnp.asarray(batch["targets_BS"])
        report = nnx.merge(graph, state).score(ModelInputs.of_batch(batch), targets_BS).report
        assert report is not None, "a model with routed experts reports its layers"
        ids_LBSK, gates_LBSK = report.recorded.ids, report.recorded.gates
        load_LE = gate_mass(ids_LBSK, jnp.ones_like(gates_LBSK), n_experts)
        return load_LE, gate_mass(ids_LBSK, gates_LBSK, n_experts)

    compiled = jax.jit(step, out_shardings=sharding.whole())
    sums = [jax.device_get(compiled(state, batch)) for batch in batches]
    load_LE, mass_LE = np.sum(np.array(sums, np.float64), axis=0)
    return load_LE, mass_LE


class LayerWeights(NamedTuple):
    """Weights of the routed experts of one layer, and their outputs for the same tokens.

    Attributes:
      weights: all arrays of the experts, float32, each with a leading axis E.
      outputs_ETD: float32, every expert's output for the sample of tokens, whichever was chosen.
    """

    weights: Sequence[np.ndarray]
    outputs_ETD: np.ndarray


def layer_weights(model: Transformer, corpus: Corpus, sample: int = SAMPLE) -> list[LayerWeights]:
    """The experts of each MoE layer, and what they make of the same held-out tokens.

    Args:
      model: trained, with routed experts.
      corpus: prepared, in the tokens of the model.
      sample: tokens, spread evenly over the first held-out sequences.
    """
    n_sequences = min(corpus.num_records("validation"), SAMPLED_SEQUENCES)
    tasks = model.config.moe.router.tasks
    batch = next(iter(validation_batches(corpus.directory, n_sequences, 1, tasks=tasks)))
    return layer_weights_on(model, batch, sample)


def layer_weights_on(model: Transformer, batch: Batch, sample: int = SAMPLE) -> list[LayerWeights]:
    """`layer_weights` for tokens of a batch.

    Args:
      model: trained, with routed experts.
      batch: the whole, on every host.
      sample: tokens, spread evenly over the batch.
    """
    n_sequences = len(batch["tokens_BS"])
    rows = sharding.local_rows(n_sequences)
    own = {name: np.asarray(x)[rows] for name, x in batch.items()}
    graph, state = nnx.split(model)
    inputs = ModelInputs.of_batch(sharding.global_batch(own, rows, n_sequences))
    step = jax.jit(_layer_inputs, static_argnums=0, out_shardings=sharding.whole())
    valid_BS = np.asarray(batch["segment_ids_BS"]) > 0
    found = []
    activation = form_of(model.config.moe.expert).activation
    outputs = jax.jit(
        jax.vmap(lambda x_TD, w: experts.one_expert_on(x_TD, w, activation), (None, 0))
    )
    for x_BSD, number in zip(step(graph, state, inputs), model.config.moe_layers, strict=True):
        layer = model.layer(number).moe.expert_weights()
        x_TD = np.asarray(x_BSD, np.float32)[valid_BS]
        places = np.linspace(0, len(x_TD) - 1, min(sample, len(x_TD))).astype(int)
        outputs_ETD = outputs(jnp.asarray(x_TD[places]), layer)
        matrices = [np.asarray(dequantise(w), np.float32) for w in layer if w is not None]
        found.append(LayerWeights(matrices, np.asarray(outputs_ETD)))
    return found


def _layer_inputs(graph: nnx.GraphDef, state: nnx.State, inputs: ModelInputs) -> jax.Array:
    """The input of each MoE layer, (L, B, S, D)."""
    model: Transformer = nnx.merge(graph, state)
    kept = Intervention(keep_inputs=True)
    report = model.score(inputs, inputs.tokens_BS, kept).report
    assert report is not None, "a model with routed experts reports its layers"
    assert report.inputs_BSD is not None, "see `keep_inputs`"
    return report.inputs_BSD


def _flat(
    batch: Batch, ids_LBSK: np.ndarray, gates_LBSK: np.ndarray, first: int
) -> tuple[np.ndarray, ...]:
    """The tokens of a batch that are no padding, in the order of `RoutedText`."""
    valid_BS = np.asarray(batch["segment_ids_BS"]) > 0
    sequence_BS = np.broadcast_to(first + np.arange(len(valid_BS))[:, None], valid_BS.shape)
    assert "domain_BS" in batch, "held-out batches say their domain"
    columns = (batch["tokens_BS"], sequence_BS, batch["positions_BS"], batch["domain_BS"])
    flat = (np.asarray(x_BS, np.int32)[valid_BS] for x_BS in columns)
    return *flat, np.asarray(ids_LBSK)[:, valid_BS], np.asarray(gates_LBSK)[:, valid_BS]

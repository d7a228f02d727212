"""Loss on held-out text: nats per token and bits per byte, overall and by domain.

Bits per byte do not depend on the tokenizer, so models with different vocabularies compare.

Shapes: B sequences, S positions, V vocabulary, G domains, L MoE layers, E routed experts,
K columns of a routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.pipeline import Batch, validation_batches
from dsmoe_jax.evaluation.cross_entropy import token_sums
from dsmoe_jax.evaluation.domain_load import gate_mass, load_by_domain
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.dropping import Ledger
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.layer import evaluated_together
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs.routing_records import Recorder, Recording
from dsmoe_jax.runs.summaries import (
    as_list,
    bits_per_byte,
    domain_specialisation,
    drop_summary,
    load_summary,
)

_DIGITS = 4  # of a sum of gates


class HeldOut:
    """The held-out text of a corpus and the compiled step that measures a model on it.

    Args:
      graph: of the model, from `nnx.split(model, nnx.Param, ...)`.
      corpus: prepared.
      batch_size: sequences evaluated at once.
      max_batches: look at this many only (every domain has its share); None is all of the text.
      recorder: gets the routing of every batch.
      recording: has the routing of every batch, for a router that replays it.
      intervention: a change to how the MoE layers are used.
      keep_routing: whether `routings` will be asked for.
      tasks: `model.moe.router.tasks` of the model.
      all_of: number of the task that all of the text is of; None: each domain's.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        corpus: Corpus,
        batch_size: int,
        max_batches: int | None = None,
        recorder: Recorder | None = None,
        recording: Recording | None = None,
        intervention: Intervention = interventions.NONE,
        *,
        keep_routing: bool = False,
        tasks: Sequence[str] = (),
        all_of: int | None = None,
    ):
        self._graph = graph
        self._labels = tasks, all_of
        self._corpus = corpus
        self._batch_size = batch_size
        self._max_batches = max_batches
        self._recorder = recorder
        self._recording = recording
        self._intervention = intervention
        self._keeps_routing = keep_routing or recorder is not None
        n_domains = len(corpus.domains)

        def step(params: nnx.State, other: nnx.State, batch: Batch):
            model = nnx.merge(graph, params, other)
            targets_BS = jnp.asarray(batch["targets_BS"])
            output = model.score(ModelInputs.of_batch(batch), targets_BS, intervention)
            bytes_V = jnp.asarray(corpus.bytes_per_token_V)
            nll_BS, _ = token_sums(output.nll_BS, batch, bytes_V)
            mask_BS = batch["loss_mask_BS"]
            bytes_BS = bytes_V[batch["targets_BS"]] * mask_BS
            assert "domain_BS" in batch, "held-out batches say their domain"
            domain_GBS = jax.nn.one_hot(batch["domain_BS"], n_domains, axis=0)
            sums = [(domain_GBS * x).sum(axis=(1, 2)) for x in (nll_BS, mask_BS, bytes_BS)]
            report = output.report
            if report is None:
                return jnp.stack(sums), None, None, None, None
            ledger = report.logged.ledger
            load_GLE = load_by_domain(
                report.recorded.sent,
                jnp.asarray(batch["domain_BS"])[:, 0],  # a held-out record is of one domain
                n_domains,
                ledger.sent_E.shape[-1],
            )
            computed = report.recorded
            mass_LE = gate_mass(computed.ids, computed.gates, ledger.sent_E.shape[-1])
            recorded = computed if self._keeps_routing else None
            return jnp.stack(sums), ledger, load_GLE, mass_LE, recorded

        self._step = jax.jit(step, out_shardings=sharding.whole())
        self._rows = sharding.local_rows(batch_size)

    @property
    def n_batches(self) -> int:
        """Number of batches that `measure` goes through."""
        whole = -(-self._corpus.num_records("validation") // self._batch_size)
        return min(self._max_batches, whole) if self._max_batches else whole

    def measure(
        self,
        params: nnx.State,
        other: nnx.State,
        on_batch: Callable[[int], None] = lambda done: None,
        name: str = "validation",
    ) -> dict[str, Any]:
        """Goes through the text once, every held-out token a target exactly once.

        Args:
          params, other: the model's state.
          on_batch: called with the number of batches done; an exception ends the measurement.
          name: of this pass, in a recording of its routing.

        Returns:
          `loss` (nats per token), `bits_per_byte`, `tokens`, `bytes`; the same for each of
          `domains`; and for a model with routed experts `load`, `maxvio`, `gini`, `dead_experts`
          and `dropped` by layer, and `load_by_domain`, the load by layer for each of `domains`:
          chosen assignments, also those that were dropped later; `gate_mass` by layer and expert,
          the sum of the gates of what was computed.  `domain_specialisation` by layer
          is there if two domains have tokens enough for it.  Where the tokens of a batch decide
          about each other, the numbers hold for one `batch_size`, which is given then.

        Raises:
          RuntimeError: if assignments are missing: neither computed nor dropped.
        """
        if self._recording is not None:  # the last batch first: too few are not worth a start
            self._recording.read(name, self.n_batches, self._batch_size)
        sums_3G = np.zeros((3, len(self._corpus.domains)))
        counts = None
        for done, batch in enumerate(self._batches(name, self._max_batches), start=1):
            *counted, recorded = self._step(params, other, batch)
            sums, *counted = jax.device_get(counted)
            if self._recorder is not None:
                self._recorder.write(name, done, jax.device_get(recorded))
            sums_3G += sums  # float64 on the host: the sum over batches loses nothing
            counted = jax.tree.map(np.float64, counted)
            counts = counted if counts is None else jax.tree.map(np.add, counts, counted)
            on_batch(done)
        assert counts is not None, "held-out text has a batch"
        return self._result(sums_3G, *counts) | self._batch(params, other)

    def routings(self, params: nnx.State, other: nnx.State) -> Iterator[RecordedRouting]:
        """The routing of every batch of the whole text, (L, B, S, K), each computed when it is due.

        It needs `keep_routing`, and a model whose router chooses by itself.

        Args:
          params, other: the model's state.
        """
        assert self._keeps_routing, "see `keep_routing`"
        assert self._recording is None, "the router chooses by itself"
        for batch in self._batches("", None):
            *_, recorded = self._step(params, other, batch)
            yield jax.device_get(recorded)

    def _batch(self, params: nnx.State, other: nnx.State) -> dict[str, int]:
        """The size of the batches, if the result depends on it."""
        moe = nnx.merge(self._graph, params, other).config.moe
        together = evaluated_together(moe) and not self._intervention.tokens_alone
        return {"batch_size": self._batch_size} if together else {}

    def _batches(self, name: str, max_batches: int | None) -> Iterator[Any]:
        """The batches of a pass on the mesh, with recorded routing if it is replayed."""
        batches = validation_batches(
            self._corpus.directory,
            self._batch_size,
            max_batches or None,
            self._rows,
            *self._labels,
        )
        for number, batch in enumerate(batches, start=1):
            if self._recording is not None:
                batch |= self._recording.read(name, number, self._batch_size, self._rows)
            yield sharding.global_batch(batch, self._rows, self._batch_size)

    def _result(
        self,
        sums_3G: np.ndarray,
        ledger: Ledger | None,
        load_GLE: np.ndarray | None,
        mass_LE: np.ndarray | None,
    ) -> dict[str, Any]:
        """The return value of `measure`, from sums over the whole text.

        Args:
          sums_3G: nats, tokens and bytes by domain.
          ledger, load_GLE, mass_LE: of the MoE layers; None without routed experts.
        """
        result: dict[str, Any] = _summary(*sums_3G.sum(axis=1))
        # A short look may miss a small domain: then it has no numbers.
        seen = {name: g for g, name in enumerate(self._corpus.domains) if sums_3G[1, g]}
        if ledger is not None and load_GLE is not None and mass_LE is not None:
            load_LE = np.asarray(ledger.sent_E)
            result |= load_summary(load_LE) | drop_summary(ledger, detailed=False)
            result["load_by_domain"] = {name: as_list(load_GLE[g], int) for name, g in seen.items()}
            result["gate_mass"] = as_list(mass_LE.round(_DIGITS))
            specialisation = domain_specialisation(load_GLE, sums_3G[1])
            if specialisation is not None:
                result["domain_specialisation"] = specialisation
        result["domains"] = {name: _summary(*sums_3G[:, g]) for name, g in seen.items()}
        return result


def evaluate(
    model: Transformer,
    corpus: Corpus,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    intervention: Intervention = interventions.NONE,
) -> dict[str, Any]:
    """Measures a model on the held-out text of a corpus: see `HeldOut.measure`."""
    graph, params, other = nnx.split(model, nnx.Param, ...)
    held_out = HeldOut(
        graph,
        corpus,
        batch_size,
        max_batches,
        intervention=intervention,
        tasks=model.config.moe.router.tasks,
    )
    return held_out.measure(params, other)


def _summary(nll: float, tokens: float, n_bytes: float) -> dict[str, float]:
    return {
        "loss": float(nll / tokens),
        "bits_per_byte": bits_per_byte(float(nll), float(n_bytes)),
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }

"""The mixture of domains that a run reads (`data.mixture`): which one each sequence is of.

The stream of a run is a pure function of its config and the corpus.  Where neighbouring stages have
another mixture or batch size, the next one is apportioned by itself.  Sequences that are left out
(`train.skip_batches`) count as read: those before them stay the same.

Within a domain the sequences come in a random order, then all of them in another one, and so on, so
that each is read once an epoch of its domain.

Shapes: G domains, B sequences of a batch, N sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from dsmoe_jax.config.checks import require
from dsmoe_jax.config.mixture import segments
from dsmoe_jax.config.stages import MixtureSpan, Stage
from dsmoe_jax.data.apportionment import Apportionment, Piece
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.places import places_by_domain
from dsmoe_jax.data.reshuffling import Epochs, permutation


class Mixture:
    """The domains of all sequences of a run.

    Args:
      spans: of the run, in order.
      skips: (updates made, sequences left out then).
      records: of the train split by domain of the corpus, in its order.
      sequence_length: tokens of a sequence.
    """

    def __init__(
        self,
        spans: Sequence[MixtureSpan],
        skips: Sequence[tuple[int, int]],
        records: Mapping[str, int],
        sequence_length: int,
    ):
        self.domains = list(records)
        self._length = sequence_length
        self._named = {name for span in spans for name in span.weights}
        self._records_G = list(records.values())
        self._spans = list(spans)
        self._skips = list(skips)
        self._parts = [_apportionment(span, self.domains) for span in spans]
        self._begins = [self._place(span.first) for span in spans]
        counts_G = np.zeros(len(records), np.int64)
        self._before_G = [counts_G]  # sequences of each domain before a span
        for i in range(len(spans) - 1):
            length = self._begins[i + 1] - self._begins[i]
            counts_G = counts_G + self._parts[i].counts(length)
            self._before_G.append(counts_G)

    def domains_and_ranks(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequences of a batch.

        Args:
          step: updates made before it.
          first: place of its first sequence in the stream.
          count: its sequences.

        Returns:
          The domain of each, int64 (B,), and how many of that domain come before it in the stream,
          int64 (B,).
        """
        i = self._span(step)
        domain_B, rank_B = self._parts[i].domains_and_ranks(first - self._begins[i], count)
        return domain_B, rank_B + self._before_G[i][domain_B]

    def row(self, step: int, last_step: int) -> dict[str, dict[str, float]]:
        """Keys of metrics.jsonl, for the domains that have a weight at any time.

        Args:
          step: updates made.
          last_step: updates that had been made at the last row.
        """
        read_G = self.sequences_read(step)
        new_G = read_G - self.sequences_read(last_step)
        named = [g for g, name in enumerate(self.domains) if name in self._named]
        found = {
            "domain_tokens": {self.domains[g]: int(read_G[g]) * self._length for g in named},
            "domain_epochs": {self.domains[g]: read_G[g] / self._records_G[g] for g in named},
        }
        if step > last_step:
            found["domain_share"] = {self.domains[g]: new_G[g] / new_G.sum() for g in named}
        return found

    def sequences_read(self, step: int) -> np.ndarray:
        """The sequences of each domain that the first `step` updates read, int64 (G,)."""
        counts_G = np.zeros(len(self.domains), np.int64)
        gaps = sorted({0, *(at for at, _ in self._skips if at < step)})
        for begin, end in zip(gaps, [*gaps[1:], step], strict=True):
            first = self._place(begin)
            last = first + self._sequences(end) - self._sequences(begin)
            counts_G += self._counts(last) - self._counts(first)
        return counts_G

    def _counts(self, place: int) -> np.ndarray:
        """The sequences of each domain among the first `place` ones of the stream."""
        i = max(i for i, begin in enumerate(self._begins) if begin <= place)
        return self._before_G[i] + self._parts[i].counts(place - self._begins[i])

    def _span(self, step: int) -> int:
        return max(i for i, span in enumerate(self._spans) if span.first <= step)

    def _sequences(self, step: int) -> int:
        """Sequences that the first `step` updates read."""
        span = self._spans[self._span(step)]
        return span.sequences + (step - span.first) * span.batch_size

    def _place(self, step: int) -> int:
        """The place in the stream of the first sequence that the next update reads."""
        return self._sequences(step) + sum(number for at, number in self._skips if at <= step)


def mixture_of(stage: Stage, corpus: Corpus) -> Mixture | None:
    """The mixture of the run that a stage belongs to; None if all text is read alike.

    Raises:
      ValueError: naming a weight that the corpus has no text for.
    """
    if not stage.mixtures:
        return None
    records = {domain["name"]: domain["records"]["train"] for domain in corpus.manifest["domains"]}
    known = ", ".join(name for name, number in records.items() if number)
    for span in stage.mixtures:
        for domain, weight in span.weights.items():
            key = f"data.mixture.{domain}"
            named = domain in records
            require(named, key, weight, f"the corpus has no such domain; must be one of {known}")
            has_none = f"the corpus has no text of it to train on; must be one of {known}"
            require(records[domain] > 0, key, weight, has_none)
    return Mixture(stage.mixtures, stage.skips, records, corpus.sequence_length)


class MixedOrder:
    """The place in a corpus of every sequence of a mixture.

    Args:
      mixture: of the run.
      corpus: whose train split it is of.
      seed: of the run.
      batch_size: sequences of a step.
    """

    def __init__(self, mixture: Mixture, corpus: Corpus, seed: int, batch_size: int):
        self._mixture = mixture
        self._batch_size = batch_size
        self._seed = _seed_of(seed, "")
        self._places = places_by_domain(corpus, "train")
        # By name: a domain keeps its order when the corpus has more domains.
        self._orders = [
            Epochs(len(places), _seed_of(seed, name))
            for name, places in zip(mixture.domains, self._places, strict=True)
        ]

    def batch(self, step: int, first: int, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows of a batch: their places in the split, and their domains.

        Args:
          step: updates made before it.
          first: place of its first sequence in the stream.
          rows: to find.
        """
        domain_B, rank_B = self._mixture.domains_and_ranks(step, first, self._batch_size)
        # Otherwise a domain would always have the same rows, and so the same devices.
        in_batch_B = permutation(self._batch_size, self._seed, first)
        chosen = in_batch_B[list(rows)].tolist()
        domains = [int(domain_B[i]) for i in chosen]
        places = [
            int(self._places[domain][self._orders[domain][int(rank_B[i])]])
            for domain, i in zip(domains, chosen, strict=True)
        ]
        return places, domains


def _seed_of(seed: int, name: str) -> int:
    """A seed of 32 bits for one domain."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _apportionment(span: MixtureSpan, domains: Sequence[str]) -> Apportionment:
    """The domains of the sequences of a span, which goes on after its last schedule's end."""

    def place(at: Fraction) -> Fraction:
        return (at * span.scheduled_steps - span.first) * span.batch_size

    def by_domain(shares: Mapping[str, Fraction]) -> list[Fraction]:
        return [shares.get(name, Fraction(0)) for name in domains]

    pieces = [
        Piece(place(part.begin), by_domain(part.shares), by_domain(part.last_shares))
        for part in segments(span.weights)
    ]
    return Apportionment(pieces)

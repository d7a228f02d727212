"""Question sets answered by likelihood: accuracy in several readings, and bits per byte.

The model chooses the answer with the largest log-likelihood after the question.  Long answers are
unlikely because they are long, so there are three more readings: per character of the answer
(`acc_norm` of the lm-evaluation-harness), per byte (`acc_bytes`), and beside the log-likelihood of
the same answer without the question (pointwise mutual information).  Where there is nothing to
choose from, the share of answers counts that greedy writing would give.

Intervals are of 95 %: Wilson's for shares, a bootstrap over the questions for bits per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.evaluation.likelihood import (
    Likelihood,
    Request,
    Scorer,
    different_windows,
    encode,
)
from dsmoe_jax.evaluation.questions import Question, QuestionSet, answer_of
from dsmoe_jax.runs.summaries import bits_per_byte

CONFIDENCE = 0.95
_RESAMPLES = 1000


class Answered(NamedTuple):
    """A question with the likelihoods of its choices, and of its unconditioned requests."""

    question: Question
    given: Sequence[Likelihood]
    alone: Sequence[Likelihood] = ()


class TokenisedSets:
    """Question sets in the tokens of a model.

    Args:
      tokenizer: of the model.
      sets: questions by the name of their set.
      max_length: positions that the model reads at once.

    Attributes:
      n_windows: different ones, see `likelihood.windows`; the unit of progress.

    Raises:
      ValueError: naming the question, for an answer that has no token of its own.
    """

    def __init__(self, tokenizer: Tokenizer, sets: Mapping[str, QuestionSet], max_length: int):
        self._sets = sets
        self._max_length = max_length
        questions = [question for one in sets.values() for question in one.questions]
        requests = [r for q in questions for r in (*q.choices, *q.unconditioned)]
        self._encoded = encode(tokenizer, requests)
        self.n_windows = len(different_windows(self._encoded, max_length))

    def measure(
        self, scorer: Scorer, on_batch: Callable[[int], None] = lambda done: None
    ) -> dict[str, dict[str, Any]]:
        """The numbers of each set: see `summary`, and `shots` and `cut` besides.

        `cut` is the number of questions that are longer, with an answer, than what the model reads
        at once.

        Args:
          scorer: the model.
          on_batch: called with the number of windows done, of `n_windows`.
        """
        likelihoods = scorer.score(self._encoded, on_batch)
        pairs = iter(zip(self._encoded, likelihoods, strict=True))
        found = {}
        for name, one in self._sets.items():
            answered = []
            cut = 0
            for question in one.questions:
                given = [next(pairs) for _ in question.choices]
                alone = [next(pairs)[1] for _ in question.unconditioned]
                answered.append(Answered(question, [pair[1] for pair in given], alone))
                cut += any(encoded.positions > self._max_length for encoded, _ in given)
            found[name] = {"shots": one.shots, "cut": cut, **summary(answered)}
        return found


def summary(answered: Sequence[Answered]) -> dict[str, Any]:
    """The numbers of a question set.

    Args:
      answered: one question or more, all with choices or all without.

    Returns:
      `questions`, their number; `chance`, the accuracy of guessing; the readings of `READINGS`,
      `greedy` and `bits_per_byte` of the right answer (mean over questions), each as `value` with
      the ends of its interval, `low` and `high`.  What a set does not have is None.
    """
    choosing = len(answered[0].question.choices) > 1
    chances = [1 / len(one.question.choices) for one in answered]
    return {
        "questions": len(answered),
        "chance": float(np.mean(chances)) if choosing else None,
        **{name: _accuracy(answered, reading) for name, reading in READINGS.items()},
        "greedy": None if choosing else _share(one.given[0].greedy for one in answered),
        "bits_per_byte": _mean([_bits_per_byte(one) for one in answered]),
    }


def _accuracy(
    answered: Sequence[Answered], reading: Callable[[Answered], list[float]]
) -> dict[str, float] | None:
    """Share of questions whose right answer has the largest score; the first of equal ones wins."""
    scores = list(map(reading, answered))
    if len(answered[0].question.choices) == 1 or not all(scores):
        return None
    labels = [one.question.label for one in answered]
    return _share(np.argmax(x) == label for x, label in zip(scores, labels, strict=True))


def _plain(one: Answered) -> list[float]:
    return [likelihood.nats for likelihood in one.given]


def _per_character(one: Answered) -> list[float]:
    lengths = [max(1, len(answer_of(request))) for request in one.question.choices]
    return [nats / n for nats, n in zip(_plain(one), lengths, strict=True)]


def _per_byte(one: Answered) -> list[float]:
    lengths = map(_bytes, one.question.choices)
    return [nats / n for nats, n in zip(_plain(one), lengths, strict=True)]


def _over_unconditioned(one: Answered) -> list[float]:
    if not one.alone:
        return []
    return [given.nats - alone.nats for given, alone in zip(one.given, one.alone, strict=True)]


READINGS: dict[str, Callable[[Answered], list[float]]] = {
    "accuracy": _plain,
    "accuracy_per_character": _per_character,
    "accuracy_per_byte": _per_byte,
    "accuracy_pmi": _over_unconditioned,
}
"""Scores of a question's choices, of which the largest is taken; none: the set has no such one."""


def _bits_per_byte(one: Answered) -> float:
    label = one.question.label
    return bits_per_byte(-one.given[label].nats, _bytes(one.question.choices[label]))


def _bytes(request: Request) -> int:
    return max(1, len(answer_of(request).encode("utf-8")))


def _share(right: Iterable[bool]) -> dict[str, float]:
    """Share of those that are right, with Wilson's interval."""
    rights = list(map(bool, right))
    test = stats.binomtest(sum(rights), len(rights))
    low, high = test.proportion_ci(CONFIDENCE, "wilson")
    return {"value": sum(rights) / len(rights), "low": float(low), "high": float(high)}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, with the interval of a bootstrap; no interval of one value."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"value": mean, "low": None, "high": None}
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(values, len(values))) for _ in range(_RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return {"value": mean, "low": float(low), "high": float(high)}

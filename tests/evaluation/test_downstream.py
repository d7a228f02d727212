"""Numbers of question sets: hand-made likelihoods with known answers, and from the model on."""

import math

import numpy as np
import pytest

from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.evaluation.downstream import Answered, TokenisedSets, summary
from dsmoe_jax.evaluation.likelihood import Likelihood, Request
from dsmoe_jax.evaluation.questions import Question, QuestionSet

CHOICES = (" no", " not at all", " 不不")  # 2, 10 and 2 characters; 2, 10 and 6 bytes


def answered(nats, label, alone=()):
    question = Question(tuple(Request("Is it so?", text) for text in CHOICES), label)
    given, without = ([Likelihood(x, False) for x in values] for values in (nats, alone))
    return Answered(question, given, without)


def value(found, name):
    return found[name]["value"]


def test_each_reading_takes_another_answer():
    """The first is likeliest, the second per character, the third per byte and beside chance."""
    nats = (-4.0, -10.0, -5.9)
    alone = (-1.0, -9.0, -5.0)
    for label, right in enumerate(({"accuracy"}, {"accuracy_per_character"}, set())):
        found = summary([answered(nats, label, alone)])
        readings = ("accuracy", "accuracy_per_character")
        assert {name for name in readings if value(found, name) == 1} == right
    found = [summary([answered(nats, label, alone)]) for label in range(3)]
    assert [value(one, "accuracy_per_byte") for one in found] == [0, 0, 1]  # -2, -1, -0.983
    assert [value(one, "accuracy_pmi") for one in found] == [0, 0, 1]  # -3, -1, -0.9


def test_shares_and_bits():
    one = answered((-1.0, -2.0, -3.0), 0)
    found = summary([one, one, answered((-1.0, -2.0, -3.0), 1), answered((-2.0, -3.0, -1.0), 2)])
    assert found["questions"] == 4
    assert found["chance"] == pytest.approx(1 / 3)
    assert value(found, "accuracy") == 3 / 4
    assert found["accuracy_pmi"] is None
    assert found["greedy"] is None
    bits = np.array([1 / 2, 1 / 2, 2 / 10, 1 / 6]) / math.log(2)
    assert value(found, "bits_per_byte") == pytest.approx(bits.mean())
    assert found["bits_per_byte"]["low"] >= bits.min()
    assert found["bits_per_byte"]["high"] <= bits.max()


def test_wilson_from_its_formula():
    found = summary([answered((-1.0, -2.0, -3.0), int(i >= 7)) for i in range(10)])["accuracy"]
    z = 1.959963984540054
    middle = (0.7 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * math.sqrt(0.7 * 0.3 / 10 + z**2 / 400)
    assert found == pytest.approx({"value": 0.7, "low": middle - half, "high": middle + half})


def test_the_bootstrap_is_as_wide_as_the_normal_interval():
    rng = np.random.default_rng(1)
    nats = rng.normal(-4.0, 1.0, 400)
    found = summary([answered((x, -1.0, -1.0), 0) for x in nats])["bits_per_byte"]
    bits = -nats / 2 / math.log(2)
    half = 1.96 * bits.std() / math.sqrt(len(bits))
    assert found["low"] == pytest.approx(bits.mean() - half, abs=0.12 * half)
    assert found["high"] == pytest.approx(bits.mean() + half, abs=0.12 * half)


def test_written_answers_have_no_accuracy():
    question = Question((Request("To be or not to", " be"),), 0)
    found = summary(
        [Answered(question, [Likelihood(-2.0, greedy)]) for greedy in (True, True, False)]
    )
    assert value(found, "greedy") == pytest.approx(2 / 3)
    assert found["chance"] is None
    assert {found[name] for name in found if name.startswith("accuracy")} == {None}
    alone = summary([Answered(question, [Likelihood(-2.0, True)])])["bits_per_byte"]
    assert alone == {"value": 2 / math.log(2) / 2, "low": None, "high": None}


class Lengths:
    """In place of a scorer: a continuation is as likely as it has few tokens."""

    def score(self, requests, on_batch):
        on_batch(len(set(requests)))
        return [Likelihood(-float(len(request.continuation)), True) for request in requests]


def test_sets_are_measured_apart_and_long_questions_are_counted(tiny_corpus):
    tokenizer = Tokenizer.load(tiny_corpus / "tokenizer.json")
    short, long = " a", " 北京北京"
    right = Question((Request("x", short), Request("x", long)), 0, (Request("", short),) * 2)
    wrong = Question((Request("y" * 99, short), Request("y" * 99, long)), 1)
    written = Question((Request("z", short),), 0)
    sets = {
        "a": QuestionSet(0, [right, right]),
        "b": QuestionSet(3, [wrong]),
        "c": QuestionSet(0, [written]),
    }
    tasks = TokenisedSets(tokenizer, sets, max_length=16)
    assert tasks.n_windows == 6, "what is asked twice counts once"
    done = []
    found = tasks.measure(Lengths(), done.append)
    assert done == [6]
    assert [found[name]["shots"] for name in "abc"] == [0, 3, 0]
    assert [found[name]["cut"] for name in "abc"] == [0, 1, 0]
    assert [value(found[name], "accuracy") for name in "ab"] == [1, 0]
    assert value(found["a"], "accuracy_pmi") == 1
    assert value(found["c"], "greedy") == 1

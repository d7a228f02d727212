"""Log-likelihoods against transformers, request by request; and how requests are cut."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.config import replace
from dsmoe_jax.evaluation import likelihood
from dsmoe_jax.evaluation.likelihood import Encoded, Request, Scorer, encode, windows
from dsmoe_jax.model.build import abstract_model

LENGTH = 24
REQUESTS = [
    ("Question: which animal barks?\nAnswer:", " a dog"),
    ("Question: which animal barks?\nAnswer:", " dog"),
    ("def f(x):\n    ", "return x"),  # the white space belongs to the continuation
    ("", "It begins with nothing."),
    ("the", "re"),  # 'there' has other tokens than 'the' and 're'
    ("Столица Китая:", " 北京"),  # in none of the text that the tokenizer learned from
    ("for i in range(10):\n" * 6, "    print(i)"),  # longer than what is read at once
]


def scorer_of(config, state, batch_size):
    return Scorer(nnx.merge(abstract_model(config.model), *state), LENGTH, batch_size)


@pytest.fixture(scope="module")
def scorer(converted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "SHORTEST", 12)  # so that there are two lengths
        yield scorer_of(*converted, batch_size=2)


def of_transformers(model, tokenizer, context, continuation):
    """As the harness computes it: log-likelihood and greediness of the last tokens of a text."""
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    n = len(whole) - len(tokenizer.encode(stripped))
    ids = [tokenizer.eos_id, *tokenizer.encode(stripped), *whole[-n:]][-(LENGTH + 1) :]
    with torch.no_grad():
        log_SV = model(torch.tensor([ids[:-1]])).logits[0, -n:].double().log_softmax(-1)
    targets = torch.tensor(ids[-n:])
    greedy = bool((log_SV.argmax(-1) == targets).all())
    return log_SV[range(n), targets].sum().item(), greedy


def test_each_request_is_as_in_transformers(theirs, scorer, tokenizer):
    requests = [Request(*request) for request in REQUESTS]
    done = []
    found = scorer.score(encode(tokenizer, [*requests, requests[0]]), done.append)
    assert done[-1] == len(requests)
    assert found[-1] == found[0], "asked twice, computed once"
    for request, one in zip(REQUESTS, found, strict=False):
        nats, greedy = of_transformers(theirs, tokenizer, *request)
        assert one.nats == pytest.approx(nats, abs=1e-4), request
        assert one.greedy == greedy


def test_what_the_model_would_write_is_greedy(theirs, scorer, tokenizer):
    context = (tokenizer.eos_id, *tokenizer.encode("import"))
    ids = list(context)
    for _ in range(3):
        with torch.no_grad():
            ids.append(theirs(torch.tensor([ids])).logits[0, -1].argmax().item())
    written = tuple(ids[len(context) :])
    other = (*written[:-1], (written[-1] + 1) % 512)
    found = scorer.score([Encoded(context, written), Encoded(context, other)])
    assert [one.greedy for one in found] == [True, False]


def test_a_continuation_longer_than_the_model_reads(theirs, scorer, tokenizer):
    """Every token is predicted once, the last ones after as many as fit."""
    ids = [tokenizer.eos_id, *tokenizer.encode("Every token is predicted once. " * 9)]
    assert len(ids) > 2 * LENGTH
    (found,) = scorer.score([Encoded((ids[0],), tuple(ids[1:]))])
    total = 0.0
    for end in (*range(LENGTH, len(ids) - 1, LENGTH), len(ids) - 1):
        first = max(0, end - LENGTH)
        new = end - (end - 1) // LENGTH * LENGTH
        with torch.no_grad():
            log_SV = theirs(torch.tensor([ids[first:end]])).logits[0].double().log_softmax(-1)
        targets = torch.tensor(ids[first + 1 : end + 1])
        total += log_SV[range(len(targets)), targets][-new:].sum().item()
    assert found.nats == pytest.approx(total, abs=1e-3)


def test_a_request_does_not_depend_on_its_batch(converted, scorer, tokenizer):
    """Though the model drops tokens in evaluation, where many want the same expert."""
    config, state = converted
    drops = replace(config, **{"model.moe.evaluation_drop.capacity_factor": 0.5})
    requests = encode(tokenizer, [Request(*request) for request in REQUESTS])
    found = scorer_of(drops, state, batch_size=2).score(requests)
    wanted = scorer.score(requests)
    np.testing.assert_allclose([x.nats for x in found], [x.nats for x in wanted], rtol=1e-5)


def test_likelihoods_must_be_finite(scorer, monkeypatch):
    nothing = jax.numpy.full(2, jax.numpy.nan), jax.numpy.zeros(2, bool)
    monkeypatch.setattr(scorer, "_step", lambda *args: nothing)
    with pytest.raises(ValueError, match="log-likelihood: not finite"):
        scorer.score([Encoded((0,), (1,) * LENGTH)])


def test_a_continuation_without_a_token_is_refused(tokenizer):
    word = next(tokenizer.token(i) for i in range(300, 512) if tokenizer.token(i).isalpha())
    with pytest.raises(ValueError, match=r"t.jsonl:3: .*no token of its own after its context"):
        encode(tokenizer, [Request(word[:-1], word[-1:], "t.jsonl:3")])
    with pytest.raises(ValueError, match=r"^'': a continuation has no token"):
        encode(tokenizer, [Request("a context", "")])


def test_foreign_text_becomes_bytes(tokenizer):
    """Byte-level BPE: no text is unknown; what it never saw has a token for each byte, at most."""
    (found,) = encode(tokenizer, [Request("x", " 北京")])
    assert len(found.continuation) == len(" 北京".encode())
    assert tokenizer.decode(found.continuation) == " 北京"


def test_windows_are_those_of_the_harness():
    """The example in the docstring of its `LM.loglikelihood_rolling`; -1 begins a text."""
    found = windows(Encoded((-1,), tuple(range(10))), 4)
    read = [([*w.context, *w.continuation][:-1], list(w.continuation)) for w in found]
    assert read == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 12))
def test_windows_predict_every_token_once(n_context, n_continuation, max_length):
    tokens = tuple(range(n_context + n_continuation))
    found = windows(Encoded(tokens[:n_context], tokens[n_context:]), max_length)
    assert sum((w.continuation for w in found), ()) == tokens[n_context:]
    for window in found:
        last = window.continuation[-1]
        read = window.context + window.continuation
        assert read == tokens[max(0, last - max_length) : last + 1], "as much of it as fits"
        assert window.context

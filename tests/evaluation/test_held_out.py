"""Held-out loss against a plain loop over the documents, in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.packing import decode_record, read_records
from dsmoe_jax.data.pipeline import validation_batches
from dsmoe_jax.evaluation.cross_entropy import token_sums
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.model.build import build_model
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.interventions import GENERATION
from dsmoe_jax.runs.summaries import domain_specialisation

CONFIG = replace(
    Config(),
    **{
        "model.vocab_size": 512,
        "model.hidden_size": 16,
        "model.num_hidden_layers": 1,
        "model.attention.num_attention_heads": 2,
        "model.attention.num_key_value_heads": 1,
        "model.attention.head_dim": 8,
        "model.initializer_range": 0.2,
        "model.moe.n_routed_experts": 4,
        "model.moe.num_experts_per_tok": 2,
        "model.moe.moe_intermediate_size": 8,
        "model.moe.expert_backend": "loop",
        "data.tokenizer_vocab_size": 512,
    },
)


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return load_corpus(tiny_corpus)


@pytest.fixture(scope="module")
def model():
    graph, state = nnx.split(build_model(CONFIG.model, jax.random.key(CONFIG.train.seed)))
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def held_out(model, corpus):
    graph, params, other = nnx.split(model, nnx.Param, ...)
    measured = HeldOut(graph, corpus, batch_size=8)
    return lambda: measured.measure(params, other)


@pytest.fixture(scope="module")
def result(held_out):
    return held_out()


def plain_loop(model, corpus):
    """Sums of (nats, tokens, bytes) by domain: one document of one record at a time."""

    @nnx.jit
    def forward(model, tokens_BS):
        return model(tokens_BS)

    sums = np.zeros((len(corpus.domains), 3))
    for record in read_records(corpus.shards("validation")):
        domain, tokens = decode_record(record)
        # An end-of-text token is the first input of a document: it begins a new one.
        begins = [0, *[i for i, t in enumerate(tokens[:-1]) if t == corpus.tokenizer.eos_id and i]]
        for start, end in zip(begins, [*begins[1:], len(tokens) - 1], strict=True):
            padded = np.zeros((1, 64), np.int32)  # to the right: causal attention never sees it
            padded[0, : end - start] = tokens[start:end]
            logits = np.asarray(forward(model, jnp.asarray(padded)), np.float64)[0]
            for i, target in enumerate(tokens[start + 1 : end + 1]):
                nats = np.log(np.exp(logits[i]).sum()) - logits[i, target]
                sums[domain] += nats, 1, corpus.bytes_per_token_V[target]
    return sums


def test_equals_a_plain_loop_over_documents(model, corpus, result):
    sums = plain_loop(model, corpus)
    rows = [result, *[result["domains"][name] for name in corpus.domains]]
    for row, (nats, tokens, n_bytes) in zip(rows, [sums.sum(axis=0), *sums], strict=True):
        assert (row["tokens"], row["bytes"]) == (tokens, n_bytes)
        np.testing.assert_allclose(row["loss"], nats / tokens, rtol=1e-5)
        np.testing.assert_allclose(row["bits_per_byte"], nats / math.log(2) / n_bytes, rtol=1e-5)


def test_every_held_out_token_once(corpus, result):
    for domain in corpus.manifest["domains"]:
        row = result["domains"][domain["name"]]
        assert row["tokens"] == domain["tokens"]["validation"]
        assert row["bytes"] == domain["bytes"]["validation"]
        assert np.sum(result["load_by_domain"][domain["name"]]) == row["tokens"] * 2  # K = 2
    assert np.sum(result["load"]) == result["tokens"] * 2  # padding counts nowhere


def test_specialisation_is_that_of_the_load_by_domain(corpus, result):
    load_GLE = np.array([result["load_by_domain"][name] for name in corpus.domains])
    tokens_G = np.array([result["domains"][name]["tokens"] for name in corpus.domains])
    assert result["domain_specialisation"] == domain_specialisation(load_GLE, tokens_G)


def test_twice_the_same(held_out, result):
    assert held_out() == result


def test_a_look_at_some_batches(model, corpus, result):
    graph, params, other = nnx.split(model, nnx.Param, ...)
    some = HeldOut(graph, corpus, batch_size=8, max_batches=2)
    seen = []
    assert some.measure(params, other, seen.append)["tokens"] < result["tokens"]
    assert seen == [1, 2]
    assert some.n_batches == 2


def test_a_last_batch_that_is_filled_up_drops_as_if_it_were_not(corpus, result):
    """Against the batches without their rows of padding, each by itself."""
    b = next(b for b in (8, 7, 6) if corpus.num_records("validation") % b)
    assert "batch_size" not in result, "it does not matter there"
    config = replace(CONFIG, **{"model.moe.evaluation_drop.capacity_factor": 0.8})
    graph, params, other = nnx.split(build_model(config.model, jax.random.key(0)), nnx.Param, ...)
    found = HeldOut(graph, corpus, batch_size=b).measure(params, other)

    @jax.jit
    def step(params, other, batch):
        model = nnx.merge(graph, params, other)
        output = model.score(ModelInputs.of_batch(batch), batch["targets_BS"])
        sums = token_sums(output.nll_BS, batch, corpus.bytes_per_token_V)[1]
        return sums.nll, output.report.logged.ledger.dropped_E.sum()

    nll = dropped = 0
    for batch in validation_batches(corpus.directory, b):
        rows = batch["loss_mask_BS"].any(axis=1)
        sums = step(params, other, {name: array[rows] for name, array in batch.items()})
        nll, dropped = nll + float(sums[0]), dropped + int(sums[1])
    assert found["dropped"] == [dropped]
    np.testing.assert_allclose(found["loss"], nll / found["tokens"], rtol=1e-6)
    assert found["batch_size"] == b
    alone = HeldOut(graph, corpus, 8, 2, intervention=GENERATION).measure(params, other)
    assert "batch_size" not in alone
    assert alone["dropped"] == [0]


def test_what_is_dropped_is_counted(corpus, result):
    assert result["dropped"] == [0]
    config = replace(CONFIG, **{"model.moe.evaluation_drop.capacity_factor": 0.5})
    graph, params, other = nnx.split(build_model(config.model, jax.random.key(0)), nnx.Param, ...)
    cut = HeldOut(graph, corpus, batch_size=8, max_batches=2).measure(params, other)
    sent = np.sum(cut["load"])
    assert 0.5 * sent <= cut["dropped"][0] + len(cut["load"][0]) * 2, "one more for each expert"


def test_the_loss_in_blocks_is_the_same(corpus, result):
    """By domain too; 8 sequences of 64 tokens in blocks of 100."""
    config = replace(CONFIG, **{"model.head_block_tokens": 100})
    model = build_model(config.model, jax.random.key(CONFIG.train.seed))
    graph, params, other = nnx.split(model, nnx.Param, ...)
    found = HeldOut(graph, corpus, batch_size=8).measure(params, other)
    np.testing.assert_allclose(found["loss"], result["loss"], rtol=1e-6)
    for name in corpus.domains:
        domain = found["domains"][name], result["domains"][name]
        for got, want in zip(*map(dict.values, domain), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)

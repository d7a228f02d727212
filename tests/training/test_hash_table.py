"""The hash table by frequency: counted on the corpus, in the state, saved, used."""

import numpy as np
import pytest

from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.pipeline import train_batches
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.routers.fixed import balanced_table
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.training import router_state
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.start import init_state

HASH = {
    "model.moe.router.name": "hash",
    "model.moe.router.options.table": "frequency",
    "model.moe.num_experts_per_tok": 1,
    "model.moe.balance.expert": None,
    "model.moe.balance.router_z": None,
    "train.steps": 2,
    "train.eval_every": None,
}


def test_counts_are_those_of_one_epoch_of_batches(tiny_corpus):
    corpus = load_corpus(tiny_corpus)
    n = corpus.num_records("train")
    batch = next(train_batches(tiny_corpus, 64, n, seed=0))
    inputs = batch["tokens_BS"][batch["segment_ids_BS"] > 0]
    np.testing.assert_array_equal(corpus.token_counts_V, np.bincount(inputs, minlength=512))


def test_a_run_has_the_table_keeps_it_and_routes_by_it(tiny_config, tiny_corpus, tmp_path):
    train(tiny_config(**HASH), tmp_path / "run", progress=False)
    model = load_run(tmp_path / "run").model
    table_LV = np.asarray(model.layers.moe.table_V[...])
    np.testing.assert_array_equal(table_LV[0], table_LV[1])
    counts_V = load_corpus(tiny_corpus).token_counts_V
    load = np.bincount(table_LV[0], weights=counts_V, minlength=4)
    assert load.max() / load.mean() < 1.01
    tokens = np.arange(512, dtype=np.int32)[None]
    stats = model.forward(ModelInputs(tokens)).report.logged
    np.testing.assert_array_equal(stats.load_E[0], np.bincount(table_LV[0], minlength=4))


def test_a_tokenizer_may_leave_rows_of_the_embedding_unused(tiny_config):
    """Counts are of the first token ids; the other ids, never seen, are spread."""
    counts_V = np.arange(500, 0, -1)
    table_V = router_state.first_values(tiny_config(**HASH).model, lambda: counts_V)["table_V"]
    padded_V = np.concatenate([counts_V, np.zeros(12, int)])
    np.testing.assert_array_equal(table_V, balanced_table(padded_V, 4))


def test_without_counts_it_is_refused(tiny_config):
    with pytest.raises(
        ValueError, match=r"model\.moe\.router\.options=.*'frequency'.* hash router needs token"
    ):
        init_state(tiny_config(**HASH))

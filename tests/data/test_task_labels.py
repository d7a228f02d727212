"""Tasks of documents: which domain is of which, and what batches say of it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dsmoe_jax.config.tasks import numbers_of, task_of
from dsmoe_jax.data import opening
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.pipeline import train_batches, validation_batches
from dsmoe_jax.training.derived import derive
from tests.tools.tiny import tiny

S = 64
TASKS = ("code", "en", "en_reference", "unicode_names")
BY_TASK = {"model.moe.router.name": "task"}


def test_a_domain_is_of_the_longest_beginning_of_its_name():
    domains = ["code_python", "code", "en_docstrings", "en_reference", "unicode_names"]
    assert numbers_of(domains, TASKS) == [0, 0, 1, 2, 3]
    assert [task_of(name, TASKS) for name in ("english", "unicode", "")] == [None] * 3
    message = r"^model\.moe\.router\.tasks=\('code',\): the text has the domains de, codes, which"
    with pytest.raises(ValueError, match=message):
        numbers_of(["code", "de", "codes"], ("code",))


def test_batches_have_the_task_of_each_domain(tiny_corpus):
    domains = load_corpus(tiny_corpus).domains
    numbers = np.array(numbers_of(domains, TASKS))
    for batch in validation_batches(tiny_corpus, 4, 3, tasks=TASKS):
        np.testing.assert_array_equal(batch["task_ids_BS"], numbers[batch["domain_BS"]])
        assert batch["task_ids_BS"].dtype == np.int32
    (batch,) = validation_batches(tiny_corpus, 4, 1, tasks=TASKS, all_of=2)
    np.testing.assert_array_equal(batch["task_ids_BS"], np.full((4, S), 2))
    (batch,) = validation_batches(tiny_corpus, 4, 1)
    assert "task_ids_BS" not in batch


def test_training_batches_have_it_too(tiny_corpus):
    """The same text with labels and without; none of a row is of another task."""
    arguments = tiny_corpus, S, 8, 3
    plain = list(itertools.islice(train_batches(*arguments), 3))
    labelled = list(itertools.islice(train_batches(*arguments, tasks=TASKS), 3))
    seen = set()
    for one, other in zip(plain, labelled, strict=True):
        assert other.keys() - one.keys() == {"task_ids_BS"}
        np.testing.assert_array_equal(one["tokens_BS"], other["tokens_BS"])
        rows = other["task_ids_BS"]
        assert (rows == rows[:, :1]).all()
        seen |= set(rows[:, 0].tolist())
    assert len(seen) > 1
    message = "domains en_reference, en_docstrings, unicode_n"
    with pytest.raises(ValueError, match=message):
        train_batches(*arguments, tasks=("code", "x"))
    with pytest.raises(ValueError, match=message):
        validation_batches(tiny_corpus, 4, tasks=("code", "x"))


def test_a_run_takes_the_domains_of_its_corpus(tiny_corpus, tiny_config, monkeypatch):
    config = derive(tiny_config(**BY_TASK))
    assert config.model.moe.router.tasks == tuple(load_corpus(tiny_corpus).domains)
    named = tiny_config(**BY_TASK, **{"model.moe.router.tasks": TASKS})
    assert derive(named) == named
    assert derive(tiny_config()) == tiny_config()
    monkeypatch.setattr(opening, "open_corpus", lambda data: SimpleNamespace(domains=["mine"]))
    with pytest.raises(ValueError, match=r"^data\.corpus='demo': has the one domain mine, and the"):
        derive(tiny(**BY_TASK))

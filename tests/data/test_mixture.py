"""Mixtures: what is read of each domain, in which order, from any step, by any number of hosts."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsmoe_jax.config import Config, replace, stage_of, stages_of
from dsmoe_jax.config.mixture import segments
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.mixture import Mixture, mixture_of
from dsmoe_jax.data.packing import decode_record, read_records
from dsmoe_jax.data.pipeline import Batch, train_batches
from dsmoe_jax.data.reshuffling import Epochs
from tests.tools.tiny import tiny

S = 64
NAMES = ("code_python", "en_reference", "en_docstrings", "unicode_names")


def _config(corpus: Path, weights: dict[str, object], **overrides: object) -> Config:
    mixture = {f"data.mixture.{name}": weight for name, weight in weights.items()}
    return tiny(**{"data.corpus": str(corpus), **mixture, **overrides})


def _batches(
    config: Config, corpus: Path, step: int = 0, rows: list[int] | None = None
) -> Iterator[Batch]:
    """The batches of a run from a step on, as its stages read them."""
    position = None
    for stage in stages_of(config):
        if stage.end <= step:
            continue
        train = stage.config.train
        batches = train_batches(
            corpus,
            S,
            train.global_batch_size,
            train.seed,
            rows,
            (stage.first, stage.sequences),
            stage.skips,
            (),
            mixture_of(stage, load_corpus(corpus)),
        )
        batches.set_state(position or {"next_index": step})
        yield from itertools.islice(batches, stage.end - max(stage.first, step))
        position = batches.get_state()


@pytest.fixture(scope="module")
def domain_of(tiny_corpus: Path) -> dict[bytes, str]:
    """The domain of every sequence of the corpus, by its targets."""
    corpus = load_corpus(tiny_corpus)
    found = {}
    for record in read_records(corpus.shards("train")):
        domain, tokens = decode_record(record)
        found[tokens[1:].tobytes()] = corpus.domains[domain]
    return found


def _sequences(batch: Batch) -> list[bytes]:
    masks = batch["loss_mask_BS"] > 0
    return [row[mask].tobytes() for row, mask in zip(batch["targets_BS"], masks, strict=True)]


def _assert_same(left: list[Batch], right: list[Batch]):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens_BS"], b["tokens_BS"])


def test_what_is_read_is_the_mixture(tiny_corpus: Path, domain_of: dict[bytes, str]):
    weights = {"code_python": 0.5, "unicode_names": 0.3, "en_reference": 0.2, "en_docstrings": 0}
    config = _config(tiny_corpus, weights, **{"train.steps": 50, "train.global_batch_size": 8})
    read = Counter()
    mixture = mixture_of(stage_of(config, 1), load_corpus(tiny_corpus))
    assert mixture is not None
    for step, batch in enumerate(_batches(config, tiny_corpus), start=1):
        read.update(domain_of[sequence] for sequence in _sequences(batch))
        for name, weight in weights.items():
            assert abs(read[name] - weight * 8 * step) < 0.5 + weight * 3
        assert mixture.sequences_read(step).tolist() == [read[name] for name in NAMES]
    row = mixture.row(50, 40)
    assert row["domain_tokens"] == {name: read[name] * S for name in NAMES}
    assert sum(row["domain_tokens"].values()) == 50 * 8 * S
    assert sum(row["domain_share"].values()) == pytest.approx(1)
    assert row["domain_share"]["code_python"] == pytest.approx(0.5, abs=0.02)


def test_a_domain_is_read_once_an_epoch(tiny_corpus: Path, domain_of: dict[bytes, str]):
    records = Counter(domain_of.values())
    n = records["code_python"]
    # One sequence a batch: the order of the rows in a batch plays no part.
    sizes = {"train.global_batch_size": 1, "train.steps": 3 * n}
    config = _config(tiny_corpus, {"code_python": 2, "unicode_names": 1}, **sizes)
    read: dict[str, list[bytes]] = {name: [] for name in NAMES}
    for batch in _batches(config, tiny_corpus):
        (sequence,) = _sequences(batch)
        read[domain_of[sequence]].append(sequence)
    first, second = (read["code_python"][i * n : (i + 1) * n] for i in range(2))
    own = sorted(sequence for sequence, domain in domain_of.items() if domain == "code_python")
    assert sorted(first) == sorted(second) == own
    assert first != second
    assert len(set(read["unicode_names"])) == len(read["unicode_names"]) == n
    mixture = mixture_of(stage_of(config, 1), load_corpus(tiny_corpus))
    assert mixture is not None
    epochs = mixture.row(3 * n, 0)["domain_epochs"]
    assert epochs == {"code_python": 2, "unicode_names": n / records["unicode_names"]}


@pytest.mark.parametrize("n", [1, 2, 7, 4096, 4097])
def test_epochs_are_permutations(n: int):
    order = Epochs(n, seed=2**32 - 1)
    for epoch in (0, 5):
        assert sorted(order[epoch * n + i] for i in range(n)) == list(range(n))
    if n > 7:
        assert [order[i] for i in range(n)] != [order[n + i] for i in range(n)]


runs = st.fixed_dictionaries(
    {
        "weights": st.lists(
            st.one_of(
                st.integers(0, 5),
                st.tuples(
                    st.tuples(st.just(0.25), st.integers(1, 5)),
                    st.tuples(st.just(0.75), st.integers(1, 5)),
                ),
            ),
            min_size=4,
            max_size=4,
        ).filter(any),
        "batch_sizes": st.sampled_from([(4, 4), (2, 6)]),
        "skips": st.sampled_from([(), ((4, 2),), ((1, 1), (9, 3))]),
    }
)


def _run(corpus: Path, weights: list[object], batch_sizes: tuple, skips: tuple) -> Config:
    """A run of two stages, the second one with the weights of other domains."""
    columns = {
        f"train.stages.data.mixture.{name}": (weight, other)
        for name, weight, other in zip(NAMES, weights, [1, *weights[:-1]], strict=True)
    }
    return tiny(
        **{
            "data.corpus": str(corpus),
            "train.steps": 12,
            "train.skip_batches": skips,
            "train.stages.share": (0.5, 0.5),
            "train.stages.train.global_batch_size": batch_sizes,
            **columns,
        }
    )


@hypothesis.settings(max_examples=8)
@hypothesis.given(run=runs, step=st.integers(0, 11))
def test_from_any_step_and_by_any_hosts(tiny_corpus: Path, run: dict, step: int):
    config = _run(tiny_corpus, **run)
    whole = list(_batches(config, tiny_corpus))
    assert len(whole) == 12
    _assert_same(list(_batches(config, tiny_corpus, step)), whole[step:])
    for rows in ([0], [1]):
        part = _batches(config, tiny_corpus, rows=rows)
        expected = [{key: x[rows] for key, x in batch.items()} for batch in whole]
        _assert_same(list(part), expected)


@hypothesis.settings(max_examples=15)
@hypothesis.given(run=runs)
def test_counts_of_any_step_without_reading(run: dict):
    config = _run(Path("nowhere"), **run)
    first, second = stages_of(config)
    mixture = Mixture(first.mixtures, first.skips, dict.fromkeys(NAMES, 100), S)
    counts = np.zeros(4, int)
    seen: list[set[int]] = [set() for _ in NAMES]
    for step in range(12):
        stage = stage_of(config, step + 1)
        size = stage.config.train.global_batch_size
        place = stage.sequences + (step - stage.first) * size
        place += sum(number for at, number in stage.skips if at <= step)
        domain_B, rank_B = mixture.domains_and_ranks(step, place, size)
        counts += np.bincount(domain_B, minlength=4)
        np.testing.assert_array_equal(mixture.sequences_read(step + 1), counts)
        for domain, rank in zip(domain_B, rank_B, strict=True):
            assert rank not in seen[domain]  # none is read twice, whatever is left out
            seen[domain].add(rank)
    assert second.first == 6


def test_what_is_changed_on_the_way_leaves_the_past(tiny_corpus: Path):
    """Skipped batches and changes of the rate, see runs/going_on.py."""
    weights = {"code_python": ((0.0, 1), (1.0, 4)), "en_docstrings": 2}
    config = _config(tiny_corpus, weights, **{"train.steps": 12})
    whole = list(_batches(config, tiny_corpus))
    changed = replace(config, **{"train.skip_batches": ((8, 1),)})
    skipping = list(_batches(changed, tiny_corpus))
    _assert_same(skipping[:7], whole[:7])
    _assert_same(skipping[7:11], whole[8:])
    slower = replace(config, **{"optimizer.rate_changes": ((5, 0.5),)})
    assert len(stages_of(slower)) == 2
    _assert_same(list(_batches(slower, tiny_corpus)), whole)
    longer = replace(config, **{"train.steps": 16, "train.schedule_steps": 12})
    _assert_same(list(_batches(longer, tiny_corpus))[:12], whole)


def test_rows_do_not_belong_to_domains(tiny_corpus: Path, domain_of: dict[bytes, str]):
    """With as many rows as there are devices no device may see one domain only."""
    weights = {"code_python": 1, "en_docstrings": 1}
    config = _config(tiny_corpus, weights, **{"train.steps": 20, "train.global_batch_size": 2})
    rows = [map(domain_of.__getitem__, _sequences(b)) for b in _batches(config, tiny_corpus)]
    firsts = Counter(first for first, _ in rows)
    assert set(firsts) == set(weights)
    assert min(firsts.values()) > 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"code": 1},
            r"data\.mixture\.code=1: the corpus has no such domain; must be one of code_",
        ),
        (
            {"code_python": 1, "unicode_names": 1},
            r"mixture\.unicode_names=1: the corpus has no text of it to train on; must be one of",
        ),
    ],
)
def test_weights_that_name_no_text(tiny_corpus: Path, weights: dict, message: str):
    corpus = load_corpus(tiny_corpus)
    domains = [dict(domain) for domain in corpus.manifest["domains"]]
    domains[3]["records"] = {"train": 0, "validation": 5}
    corpus = dataclasses.replace(corpus, manifest={**corpus.manifest, "domains": domains})
    with pytest.raises(ValueError, match=message):
        mixture_of(stage_of(_config(tiny_corpus, weights), 1), corpus)


def test_records_of_other_domains_than_the_manifest_says(tiny_corpus: Path, tmp_path: Path):
    shutil.copytree(tiny_corpus, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["domains"].reverse()
    path.write_text(json.dumps(manifest), "utf-8")
    config = _config(tmp_path / "copy", {"code_python": 1, "en_docstrings": 1})
    with pytest.raises(ValueError, match="its records are of other domains than its manifest says"):
        next(_batches(config, tmp_path / "copy"))


def test_the_share_of_a_schedule():
    weights = {"a": 1, "b": ((0.2, 1), (0.6, 3), (0.6, 0), (0.8, 0.1))}
    found = segments(weights)
    assert [float(part.begin) for part in found] == [0, 0.2, 0.6, 0.8, 1.0]
    assert [float(part.shares["b"]) for part in found] == [0.5, 0.5, 0, 1 / 11, 1 / 11]
    assert [float(part.last_shares["b"]) for part in found] == [0.5, 0.75, 1 / 11, 1 / 11, 1 / 11]
    for part in found:
        assert sum(part.shares.values()) == sum(part.last_shares.values()) == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1, "b": 2}, r"data\.mixture\.a=-1: must be a weight >= 0, or pairs"),
        ({"a": "much"}, r"data\.mixture\.a='much': must be a weight >= 0"),
        ({"a": True}, r"data\.mixture\.a=True: must be a weight >= 0"),
        ({"a": ((0.5, 1), (0.2, 1))}, r"data\.mixture\.a=.*with growing shares in 0\.\.1"),
        ({"a": ((0.5, -1),)}, r"data\.mixture\.a=.*must be a weight >= 0"),
        ({"a": float("nan")}, r"data\.mixture\.a=nan: must be a weight >= 0"),
        ({"a": 0, "b": 0}, r"data\.mixture=\{'a': 0, 'b': 0\}: the weights sum to 0 at 0 of"),
        ({"a": ((0, 1), (1, 0))}, r"data\.mixture=.*: the weights sum to 0 at 1 of the steps"),
    ],
)
def test_weights_that_are_no_mixture(weights: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _config(Path("nowhere"), weights)


def test_no_weights_at_all():
    with pytest.raises(ValueError, match=r"data\.mixture=\{\}: must name a domain"):
        tiny(**{"data.mixture": {}})


def test_a_domain_with_a_dot_in_its_name():
    config = _config(Path("nowhere"), {"wiki.en": 1, "wiki.de": ((0, 1), (1, 2))})
    assert config.data.mixture == {"wiki.en": 1, "wiki.de": ((0, 1), (1, 2))}
    without = replace(config, **{"data.mixture.wiki.en": None})
    assert without.data.mixture == {"wiki.de": ((0, 1), (1, 2))}

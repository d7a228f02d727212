"""Documents: cutting loses nothing, the split respects groups and depends on content alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.data.documents import (
    Document,
    choose,
    choose_with_validation,
    cut,
    digest,
    num_bytes,
)


@given(st.text(alphabet=st.sampled_from("ab 中\n\r\u2028"), max_size=400), st.integers(1, 50))
def test_cut_loses_nothing_and_respects_the_size(text: str, piece_bytes: int):
    pieces = list(cut(text, piece_bytes))
    assert "".join(pieces) == text
    for piece in pieces:
        assert num_bytes(piece) <= piece_bytes or len(piece.splitlines()) == 1


def _documents(n: int, group_of=lambda i: None) -> list[Document]:
    return [Document(f"document {i} " + "x" * (i % 37), group_of(i)) for i in range(n)]


def test_groups_stay_on_one_side():
    documents = _documents(300, group_of=lambda i: f"work {i // 3}")
    split = choose(documents, "d")
    side = {text: "t" for text in split.train} | {text: "v" for text in split.validation}
    assert len(side) == 300
    for i in range(0, 300, 3):
        assert len({side[d.text] for d in documents[i : i + 3]}) == 1


def test_split_depends_on_content_not_on_order():
    documents = _documents(200)
    shuffled = random.Random(0).sample(documents, 200)
    assert choose(documents, "d") == choose(shuffled, "d")


def test_validation_takes_its_fraction_and_the_cap_holds():
    documents = _documents(1000)
    total = sum(num_bytes(d.text) for d in documents)
    split = choose(documents, "d")
    held_out = sum(map(num_bytes, split.validation))
    assert 0.045 * total <= held_out <= 0.05 * total
    capped = choose(documents, "d", max_bytes=total // 4)
    kept = sum(map(num_bytes, capped.train + capped.validation))
    assert total / 4 <= kept < total / 4 + 100  # up to the document that reaches the cap


def test_repeats_and_blanks_are_dropped():
    documents = [*_documents(50), *_documents(50), Document(""), Document(" \n")]
    split = choose(documents, "d")
    assert len(split.train + split.validation) == 50
    assert (split.repeats, split.blank) == (50, 2)


def test_repeats_are_kept_on_one_side():
    """Copies of 50 documents, ten of them in three; also those in several groups."""
    documents = [*_documents(50), *_documents(50, lambda i: "one group"), *_documents(10)]
    split = choose(documents, "d", keep_repeats=True)
    assert (split.repeats, len(split.train + split.validation)) == (0, 110)
    assert set(split.train).isdisjoint(split.validation)
    assert {split.train.count(t) + split.validation.count(t) for t in split.train} <= {2, 3}
    assert choose(_documents(50), "d", keep_repeats=True) == choose(_documents(50), "d")


def test_the_split_that_the_user_gives():
    held_out = [Document(f"held {i}") for i in range(5)]
    shared = _documents(100)[7:9]
    digests = {digest(document.text) for document in held_out + shared}
    split = choose_with_validation(
        [*_documents(100), *_documents(3), Document(" ")], [*held_out, *shared, *held_out], digests
    )
    assert sorted(split.validation) == sorted(d.text for d in held_out + shared)
    assert sorted(split.train) == sorted(
        {d.text for d in _documents(100)} - {d.text for d in shared}
    )
    assert (split.repeats, split.blank, split.held_out_too) == (3 + 5, 1, 2)
    kept = choose_with_validation(_documents(3) * 2, held_out * 2, digests, keep_repeats=True)
    assert (len(kept.train), len(kept.validation), kept.repeats) == (6, 10, 0)
    capped = choose_with_validation(_documents(100), held_out, digests, max_bytes=500)
    assert 500 <= sum(map(num_bytes, capped.train)) < 600
    assert len(capped.validation) == 5  # the cap is on the text to train on


def test_a_group_too_large_for_validation_leaves_the_smallest():
    split = choose([Document("a" * 100), Document("b" * 90), Document("c" * 110)], "d")
    assert split.validation == ["b" * 90]


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "'d' is too small: no text"), ([Document("only")], "'d' is too small: one document")],
)
def test_too_few_documents(documents: list[Document], message: str):
    with pytest.raises(ValueError, match=message):
        choose(documents, "d")


def test_too_few_documents_name_their_file():
    copies = [Document("only", place="law/a.txt")] * 3
    with pytest.raises(ValueError, match=r"one document only, in law/a\.txt, and 2 exact copies"):
        choose(copies, "law")

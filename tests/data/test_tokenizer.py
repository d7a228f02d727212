"""Tokenizer: any Unicode text comes back, its bytes are accounted for, training repeats itself."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, implementations, models, pre_tokenizers

from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.tokenizer import END_OF_TEXT, PAD, UNFINISHED, Tokenizer, train_tokenizer

_TEXTS = [
    "the quick brown fox jumps over the lazy dog\n",
    "深度求索专家混合模型",
    "def f(x): x",
] * 9
_TOKENIZER = train_tokenizer(_TEXTS, 300)
# Everything but lone surrogates, which no UTF-8 text holds.
_UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(_UNICODE)
def test_round_trip_and_byte_count(text: str):
    ids = _TOKENIZER.encode(text)
    assert _TOKENIZER.decode(ids) == text
    assert _TOKENIZER.bytes_per_token_V[ids].sum() == len(text.encode("utf-8"))
    assert _TOKENIZER.encode_batch([text]) == [ids]


@given(_UNICODE)
def test_pieces_of_a_text_are_the_text(text: str):
    """Each character stands at the token that completes it."""
    ids = _TOKENIZER.encode(text)
    pieces = _TOKENIZER.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).replace(UNFINISHED, "") == text.replace(UNFINISHED, "")


def test_a_part_of_a_character_is_bytes():
    ids = _TOKENIZER.encode("ส")
    assert _TOKENIZER.pieces(ids) == [UNFINISHED, UNFINISHED, "ส"]
    assert [_TOKENIZER.token(i) for i in ids] == ["<e0>", "<b8>", "<aa>"]
    cut = [ids[2], _TOKENIZER.eos_id, ids[0], *_TOKENIZER.encode("x")]
    assert _TOKENIZER.pieces(cut) == [UNFINISHED, END_OF_TEXT, UNFINISHED, "x"]


def test_what_a_model_may_write():
    """All that text encodes to and the end of it; no padding, no id past the last token."""
    v = _TOKENIZER.vocab_size
    allowed_V = _TOKENIZER.may_be_written(v + 20)
    assert allowed_V.shape == (v + 20,)
    assert allowed_V[_TOKENIZER.eos_id]
    assert sorted([*range(v, v + 20), _TOKENIZER.pad_id]) == [*(~allowed_V).nonzero()[0]]


def test_text_never_encodes_to_a_special_token(tmp_path: Path):
    text = f"a {END_OF_TEXT} b {PAD}{END_OF_TEXT}"
    path = tmp_path / "tokenizer.json"
    path.write_text(_TOKENIZER.to_json(), "utf-8")
    for tokenizer in (_TOKENIZER, Tokenizer.load(path)):
        ids = tokenizer.encode(text)
        assert {tokenizer.eos_id, tokenizer.pad_id}.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text]) == [ids]


def test_special_tokens_have_names_and_no_bytes():
    eos, pad = _TOKENIZER.eos_id, _TOKENIZER.pad_id
    assert eos != pad
    assert (_TOKENIZER.token(eos), _TOKENIZER.token(pad)) == (END_OF_TEXT, PAD)
    assert _TOKENIZER.decode([eos, *_TOKENIZER.encode("x"), pad]) == "x"
    assert (_TOKENIZER.bytes_per_token_V == 0).sum() == 2


def test_training_is_deterministic(tiny_corpus: Path):
    texts = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    assert train_tokenizer(texts, 700).to_json() == train_tokenizer(texts, 700).to_json()
    assert load_corpus(tiny_corpus).tokenizer.vocab_size == 512


def test_training_refuses_impossible_sizes():
    with pytest.raises(ValueError, match=r"vocab_size=257 is too small.* at least 258"):
        train_tokenizer(_TEXTS, 257)
    with pytest.raises(ValueError, match=r"vocab_size=5000 is too large.* only"):
        train_tokenizer(_TEXTS, 5000)


def test_load_names_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(_TOKENIZER.to_json()[:999], "utf-8")
    with pytest.raises(ValueError, match=r"cut\.json: not a tokenizers file"):
        Tokenizer.load(tmp_path / "cut.json")
    foreign = _TOKENIZER.to_json().replace(PAD, "[PAD]")
    (tmp_path / "foreign.json").write_text(foreign, "utf-8")
    with pytest.raises(ValueError, match="lacks the special token"):
        Tokenizer.load(tmp_path / "foreign.json")


def _others_byte_level(**options: object) -> HuggingFaceTokenizer:
    """As others train theirs: with special tokens of their own, spaces as tokens, a cut at 4."""
    theirs = implementations.ByteLevelBPETokenizer(**options)
    theirs.train_from_iterator(_TEXTS, 300, special_tokens=["<s>", "</s>"], show_progress=False)
    theirs.add_tokens(["    ", "専"])
    theirs.enable_truncation(4)
    theirs.enable_padding(length=9)
    return theirs._tokenizer


class TestOthers:
    def test_byte_level_is_adopted(self, tmp_path: Path):
        theirs = _others_byte_level()
        size = theirs.get_vocab_size()
        theirs.save(str(tmp_path / "tokenizer.json"))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            ours = Tokenizer.adopt(path)
            assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (size, size + 1, size + 2)
        theirs.no_truncation()
        theirs.no_padding()
        text = "def f(x):\n    深 専 lazy dogs"
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode_batch([ids]) == [text]
        assert len(ours.encode("d")) == 1  # neither cut nor padded
        assert ours.bytes_per_token_V[ids].sum() == len(text.encode())
        assert ours.bytes_per_token_V[[theirs.token_to_id("<s>"), size, size + 1]].sum() == 0
        special = f"{END_OF_TEXT}</s>"
        assert {ours.eos_id, theirs.token_to_id("</s>")}.isdisjoint(ours.encode(special))
        (tmp_path / "tokenizer.json").write_text(ours.to_json(), "utf-8")
        assert Tokenizer.adopt(tmp_path).to_json() == ours.to_json()

    def test_ours_is_adopted_as_it_is(self, tmp_path: Path):
        (tmp_path / "tokenizer.json").write_text(_TOKENIZER.to_json(), "utf-8")
        assert Tokenizer.adopt(tmp_path).to_json() == _TOKENIZER.to_json()

    @pytest.mark.parametrize(
        "implementation",
        [implementations.SentencePieceBPETokenizer, implementations.BertWordPieceTokenizer],
    )
    def test_others_are_refused(self, tmp_path: Path, implementation: type):
        theirs = implementation()
        theirs.train_from_iterator(_TEXTS, 100, show_progress=False)
        theirs.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer\.json: must be byte-level"):
            Tokenizer.adopt(tmp_path)

    @pytest.mark.parametrize("hole", [1, 500])
    def test_ids_with_holes(self, tmp_path: Path, hole: int):
        """The special tokens that are added may have the ids of others, or fit into the hole."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        ids = {byte: i + hole * (i >= 200) for i, byte in enumerate(alphabet)}
        theirs = HuggingFaceTokenizer(models.BPE(vocab=ids, merges=[]))
        theirs.decoder = decoders.ByteLevel()
        theirs.save(str(tmp_path / "tokenizer.json"))
        if hole == 1:
            with pytest.raises(ValueError, match="its ids have holes"):
                Tokenizer.adopt(tmp_path)
        else:
            ours = Tokenizer.adopt(tmp_path)
            assert ours.vocab_size == len(ours.bytes_per_token_V) == 756

    def test_what_is_missing_is_named(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
            Tokenizer.adopt(tmp_path)
        (tmp_path / "a.json").write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"a\.json: not a tokenizers file"):
            Tokenizer.adopt(tmp_path / "a.json")

"""Texts that grow by tokens: the same text as decoded at once, cut as by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.data.growing_text import GrowingText
from dsmoe_jax.data.tokenizer import train_tokenizer

SAMPLE = "a stop string, then more: a stop, a stöp — 日本語 🙂 stop stop\n" * 3
TOKENIZER = train_tokenizer([SAMPLE], 290)
TOKENS = [i for i in range(TOKENIZER.vocab_size) if i not in (TOKENIZER.eos_id, TOKENIZER.pad_id)]


def grown(tokens, stop_strings=()):
    """The text of tokens, and how it grew; what was there stays."""
    text = GrowingText(TOKENIZER, stop_strings)
    seen = [""]
    for token in tokens:
        text.add([token])
        assert text.text.startswith(seen[-1])
        seen.append(text.text)
    text.close()
    assert text.text.startswith(seen[-1])
    return text, seen


def cut(text, stop_strings):
    """Text before the first complete stop string, looked at character by character."""
    for end in range(len(text) + 1):
        if found := [s for s in stop_strings if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


@given(st.lists(st.sampled_from(TOKENS), max_size=30))
def test_any_tokens_give_the_text_that_they_give_together(tokens):
    """Bytes that are no UTF-8 included."""
    text, _ = grown(tokens)
    assert text.text == TOKENIZER.decode(tokens)
    assert (text.tokens, text.stop_reason) == (len(tokens), "max_new_tokens")


def test_characters_come_as_soon_as_they_are_whole():
    tokens = TOKENIZER.encode("é𝄞x")
    assert len(tokens) == 2 + 4 + 1, "a token a byte"
    _, seen = grown(tokens)
    assert seen == ["", "", "é", "é", "é", "é", "é𝄞", "é𝄞x"]


@given(
    st.text("stop ö🙂", max_size=20),
    st.lists(st.text("stop ö🙂", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_complete_stop_string(written, stop_strings):
    text, _ = grown(TOKENIZER.encode(written), stop_strings)
    assert text.text == cut(written, stop_strings)
    found = any(string in written for string in stop_strings)
    assert text.stop_reason == ("stop_string" if found else "max_new_tokens")


def test_what_may_become_a_stop_string_is_held_back():
    tokens = [*TOKENIZER.encode("xyabab"), *TOKENIZER.encode("c")]
    assert len(tokens) == 7
    text, seen = grown(tokens, ["ababc", "zz"])
    assert seen[1:] == ["x", "xy", "xy", "xy", "xy", "xy", "xy"]
    assert (text.text, text.tokens, text.stop_reason) == ("xy", 7, "stop_string")
    text, seen = grown([*tokens[:-1], *TOKENIZER.encode("q")], ["ababc"])
    assert seen[-2:] == ["xy", "xyababq"]


def test_nothing_comes_after_the_end():
    word = TOKENIZER.encode("more")
    text = GrowingText(TOKENIZER, ["or"])
    text.add([TOKENIZER.eos_id, *word])
    text.close()
    assert (text.text, text.tokens, text.stop_reason) == ("", 0, "end_of_text")
    text = GrowingText(TOKENIZER, ["o"])
    text.add([*word, TOKENIZER.eos_id])
    assert (text.text, text.stop_reason) == ("m", "stop_string")


def test_a_stop_string_must_not_be_empty():
    with pytest.raises(ValueError, match="stop='': must not be empty"):
        GrowingText(TOKENIZER, ["a", ""])

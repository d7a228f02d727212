"""Conversations: which targets count, that none crosses a border, and bad rows by file and line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data import chat, packed, packing
from dsmoe_jax.data.chat import Message
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.data.packing import encode_record, read_records
from dsmoe_jax.data.pipeline import make_batch, validation_batches
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.data.tokenizer import train_tokenizer

BYTES = train_tokenizer(["text"], 258)  # a token a byte
EOS, PAD = BYTES.eos_id, BYTES.pad_id
TURNS = [
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Yo"),
    Message("user", "Bye"),
    Message("assistant", "So long"),
]


def tokens_of(messages, tokenizer=BYTES):
    pieces = chat.pieces(messages)
    encoded = tokenizer.encode_batch([piece.text for piece in pieces])
    return chat.join(encoded, pieces, tokenizer.eos_id)


def batch_of(documents, length):
    records = packing.pack_whole(documents, length, EOS).records
    return make_batch([encode_record(0, record) for record in records], length, EOS, PAD)


def ids(text):
    """One id a byte, `$` being the end of the text."""
    return [EOS if c == "$" else BYTES.encode(c)[0] for c in text]


def test_a_conversation_by_hand():
    """Tokens, targets and mask, written out; `$` is the end-of-text token."""
    read = "$Be brief.\n\nUser: Hi\n\nAssistant: Yo$User: Bye\n\nAssistant: So long"
    told = "Be brief.\n\nUser: Hi\n\nAssistant: Yo$User: Bye\n\nAssistant: So long$"
    batch = batch_of([tokens_of(TURNS)], 67)
    np.testing.assert_array_equal(batch["tokens_BS"], [[*ids(read), PAD, PAD]])
    np.testing.assert_array_equal(batch["targets_BS"], [[*ids(told), PAD, PAD]])
    mask = [0] * 31 + [1] * len(" Yo$") + [0] * 21 + [1] * len(" So long$") + [0, 0]
    np.testing.assert_array_equal(batch["loss_mask_BS"], [mask])
    # One document: the second question sees the first answer.
    np.testing.assert_array_equal(batch["segment_ids_BS"], [[1] * 65 + [0, 0]])
    np.testing.assert_array_equal(batch["positions_BS"], [[*range(65), 0, 0]])


CONTENT = st.text("ab $\n", min_size=1, max_size=6).filter(str.strip)
TURN = st.tuples(CONTENT, CONTENT)
CONVERSATION = st.builds(
    lambda system, turns: [
        *(Message("system", text) for text in system),
        *(Message(*m) for q, a in turns for m in (("user", q), ("assistant", a))),
    ],
    st.lists(CONTENT, max_size=1),
    st.lists(TURN, min_size=1, max_size=3),
)


SHORT = [Message("user", "a"), Message("assistant", "b")]


@given(st.lists(CONVERSATION, min_size=1, max_size=6), st.integers(30, 120))
def test_exactly_the_answers_count(conversations, length):
    """Read back from the batch: each document is a conversation, its counted targets the answers.

    A conversation that is too long shows its beginning; the rest of the record is its own.
    """
    found = Counter()
    expected = Counter(filter(None, (whole(c, length) for c in conversations)))
    # A batch has a record: of conversations that are all too long there is none.
    batch = batch_of([tokens_of(c) for c in (*conversations, SHORT)], length)
    expected[whole(SHORT, length)] += 1
    for row in range(len(batch["tokens_BS"])):
        segment_S, told_S, mask_S = (
            batch[f"{name}_BS"][row] for name in ("segment_ids", "targets", "loss_mask")
        )
        assert set(segment_S[mask_S == 1]) <= set(range(1, segment_S.max() + 1))
        for i in range(1, segment_S.max() + 1):
            mine = segment_S == i
            found[(*told_S[mine],), (*told_S[mine & (mask_S == 1)],)] += 1
            assert batch["tokens_BS"][row][mine][0] == EOS
            assert batch["positions_BS"][row][mine].tolist() == list(range(mine.sum()))
    assert found == expected


def whole(conversation, length):
    """Targets of a conversation and those of its answers, by the format's words."""
    told, answers = [], []
    for role, content in conversation:
        before = {"system": "", "user": "User: ", "assistant": "Assistant:"}[role]
        after = f" {content}" if role == "assistant" else f"{content}\n\n"
        told += BYTES.encode(before)
        if role == "assistant":
            said = [*BYTES.encode(after), EOS]
            answers += [(len(told) + i, token) for i, token in enumerate(said)]
            told += said
        else:
            told += BYTES.encode(after)
    counted = tuple(token for place, token in answers if place < length)
    return (tuple(told[:length]), counted) if counted else None


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 30))
def test_best_fit_wastes_little(lengths, room):
    """Every document once, no record over its length, and no two half-empty ones."""
    documents = [np.full(n - 1, 5) for n in lengths]
    packed_into = packing.pack_whole(documents, room, EOS)
    used = [len(record) - 1 for record in packed_into.records]
    assert sum(used) == sum(lengths)
    assert all(n <= room for n in used)
    assert sum(2 * n <= room for n in used) <= 1
    assert (packed_into.cut, packed_into.left_out) == (0, 0)


def test_the_prompt_of_generation_is_the_beginning_of_training():
    tokenizer = train_tokenizer(["User: Hi\n\nAssistant: Yo User: Bye\n\nAssistant: So"] * 9, 275)
    whole = packing.ids_of(tokens_of(TURNS, tokenizer)).tolist()
    prompt = chat.prompt_ids(tokenizer, TURNS[:-1])
    assert prompt == [tokenizer.eos_id, *whole[: len(prompt) - 1]]
    assert tokenizer.decode(whole[len(prompt) - 1 :]) == " So long"
    for messages in ([], TURNS):
        with pytest.raises(ValueError, match="must end with one of the role 'user'"):
            chat.prompt_ids(tokenizer, messages)


ROWS = [
    {"messages": [m._asdict() for m in TURNS], "domain": "talk"},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "id": 7},
    {"prompt": "Name a colour", "input": "", "response": "red"},
]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_a_prepared_chat_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both forms of rows; the same by `data.rows`; packed in one file it comes back."""
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "chat.jsonl", ROWS)
    held = write(tmp_path / "held.jsonl", [{"prompt": "Say ho", "response": "ho"}])
    corpus = prepare(file, tmp_path / "out", 262, 100, validation=held, rows="chat")
    assert corpus.answers_only
    by_name = {domain["name"]: domain for domain in corpus.manifest["domains"]}
    assert by_name["talk"]["answer_tokens"] == {"train": 13, "validation": 0}
    assert by_name["talk"]["bytes"]["train"] == 63  # of 65 targets two end the text
    config = DataConfig(file, 100, 262, validation=held, rows="chat")
    assert open_corpus(config).fingerprint == corpus.fingerprint
    assert corpus.token_counts_V.sum() == sum(
        len(packing.decode_record(record)[1]) - 1 for record in read_records(corpus.shards("train"))
    )
    packed.pack(corpus, tmp_path / "chat.tar.xz")
    back = packed.unpack(tmp_path / "chat.tar.xz", tmp_path / "back")
    assert (back.fingerprint, back.manifest) == (corpus.fingerprint, corpus.manifest)
    (batch,) = validation_batches(tmp_path / "out", 1)
    counted = batch["targets_BS"][batch["loss_mask_BS"] == 1].tolist()
    assert corpus.tokenizer.decode(counted, skip_special_tokens=False) == " ho<|endoftext|>"


BAD = [
    ('{"messages": [', "not JSON"),
    ("[1]", r"must be an object with 'messages', not \[1\]"),
    ('{"text": "x"}', r"needs a field 'messages', 'instruction' or 'prompt' \(its fields: text"),
    ('{"prompt": "x"}', "needs a field 'output' or 'response'"),
    ('{"prompt": "x", "response": " \\n"}', "'response' is empty"),
    ('{"prompt": "x", "response": 3}', "'response' must be a string, not 3"),
    ('{"prompt": "x", "response": "\\ud800"}', "'response' has a lone surrogate"),
    ('{"prompt": "x", "instruction": "x", "response": "y"}', "has both 'instruction' and 'prompt'"),
    ('{"prompt": "x", "messages": [], "response": "y"}', "has both 'messages' and 'prompt'"),
    ('{"messages": []}', r"'messages' must be a list of messages, not \[\]"),
    ('{"messages": ["hi"]}', "message 1: must have 'role' and 'content', is 'hi'"),
    ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1: unknown role 'bot'; must be"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "has no answer"),
    ('{"messages": [{"role": "user", "content": ""}]}', "message 1: 'content' is empty"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "begins with an answer"),
    ('{"prompt": "x", "response": "y", "domain": 3}', "'domain' must be a string"),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_what_is_wrong_with_a_row(tmp_path: Path, line: str, says: str):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(ROWS[1]) + "\n" + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=rf"^\S*chat\.jsonl:2: {says}") as error:
        prepare(str(path), tmp_path / "out", 262, 100, rows="chat")
    assert "\n" not in str(error.value)


def test_all_bad_rows_are_named_and_nothing_is_written(tmp_path: Path):
    """The first five of all files by line, and how many more."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{\n".join(["", json.dumps(ROWS[1]) + "\n", "", ""]), "utf-8")
    write(folder / "b.jsonl", [{"prompt": "x"}] * 4)
    says = r"a\.jsonl:1: not JSON.*; \S*a\.jsonl:3: .*a\.jsonl:4: .*b\.jsonl:1: .*b\.jsonl:2: .*"
    with pytest.raises(ValueError, match=says + "; and 2 more bad rows$"):
        prepare(str(folder), tmp_path / "out", 262, 100, rows="chat")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_conversations_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Cut where the sequence ends; left out if no answer begins before; refused if none is left."""
    rows = [{"prompt": "x" * n, "response": "y" * 9} for n in (2, 20, 60)]
    file = write(tmp_path / "chat.jsonl", rows)
    held = write(tmp_path / "held.jsonl", [{"prompt": "a", "response": "b"}])
    corpus = prepare(file, tmp_path / "out", 258, 45, validation=held, rows="chat")
    note = "conversations longer than 45 tokens: 1 cut there, 1 left out, since no answer begins"
    assert note in corpus.manifest["notes"][-1]
    assert note in capsys.readouterr().err
    assert corpus.num_records("train") == 2
    with pytest.raises(ValueError, match=r"^sequence_length=9: no conversation of train has an"):
        prepare(file, tmp_path / "other", 258, 9, validation=held, rows="chat")
    assert not (tmp_path / "other").exists()


def test_other_refusals(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("no rows\n", "utf-8")
    with pytest.raises(ValueError, match=r"text\.txt: has no rows; must be \.jsonl or \.parquet"):
        prepare(str(text), tmp_path / "out", 262, 100, rows="chat")
    with pytest.raises(ValueError, match=r"^rows='talk': must be one of text, chat"):
        prepare(str(text), tmp_path / "out", 262, 100, rows="talk")
    with pytest.raises(ValueError, match=r"^rows=chat: is for text of one's own, not for the"):
        prepare("stdlib", tmp_path / "out", 262, 100, rows="chat")


def test_rows_of_parquet(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": ROWS[0]["messages"]}, {"messages": [m._asdict() for m in TURNS[1:3]]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    corpus = prepare(str(tmp_path / "chat.parquet"), tmp_path / "out", 262, 100, rows="chat")
    assert load_corpus(tmp_path / "out").fingerprint == corpus.fingerprint
    parquet.write_table(arrow.Table.from_pylist([*rows, {"messages": []}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet row 3: 'messages' must be a list"):
        prepare(str(tmp_path / "b.parquet"), tmp_path / "other", 262, 100, rows="chat")

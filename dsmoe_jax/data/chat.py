"""Conversations: rows of a file -> messages -> the text and tokens that a model reads.

A row is one of

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}      one question and its answer

where `instruction` may be called `prompt` and `output` `response`, and `input`, which may be
missing, follows the instruction after a blank line.  A field `domain` may name the row's domain;
other fields are not read.  The messages of the roles `system` and `user` are context, those of
`assistant` are answers: the loss is of these alone.

Written down, a conversation is plain text, in the format of the released DeepSeekMoE 16B Chat:

    SYSTEM

    User: QUESTION

    Assistant: ANSWER<end of text>User: QUESTION

    Assistant: ANSWER<end of text>

The role markers are words, so that any tokenizer has them.  What the model is given and what it
answers are tokenised apart: the tokens of a prompt are those that it was trained on, and no token
is half a question and half an answer.  The end of the text is part of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.data import packing
from dsmoe_jax.data.documents import Document
from dsmoe_jax.data.hub_datasets import HubPart
from dsmoe_jax.data.text_formats import NotJSON, Rows, check_unicode, domain_of, rows_of
from dsmoe_jax.data.tokenizer import Tokenizer

_CONTEXT = {"system": "{}\n\n", "user": "User: {}\n\n"}
_ANSWER = "assistant"
_BEFORE_ANSWER = "Assistant:"
ROLES = (*_CONTEXT, _ANSWER)
_QUESTION = ("instruction", "prompt")
_REPLY = ("output", "response")


class Message(NamedTuple):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


class Piece(NamedTuple):
    """A part of a document that is tokenised by itself; whether its tokens count as targets."""

    text: str
    counts: bool


class BadRows(ValueError):
    """Rows that are no conversations.

    Attributes:
      problems: a line for each, which begins with file and line.
    """

    SHOWN = 5

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        more = len(self.problems) - self.SHOWN
        ending = f"; and {more} more bad rows" if more > 0 else ""
        super().__init__("; ".join(self.problems[: self.SHOWN]) + ending)


def read_chat(path: Path | HubPart, text_column: str) -> Rows:
    """Conversations of a file of rows, each as a document whose text is `to_text` of it.

    Raises:
      BadRows: after all rows were read, naming those that are no conversations.
      ValueError: for a file that is damaged, or has no rows.
    """
    del text_column  # a conversation has fields of its own
    problems = []
    for place, row in rows_of(path):
        try:
            if isinstance(row, NotJSON):
                raise ValueError(row.problem)
            messages = to_messages(row)
            domain = domain_of(row)
        except ValueError as error:
            problems.append(f"{place}: {error}")
        else:
            yield domain, Document(to_text(messages), place=str(path))
    if problems:
        raise BadRows(problems)


def to_messages(row: Any) -> list[Message]:
    """The messages of a row, checked.

    Raises:
      ValueError: saying what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with 'messages', not {_shown(row)}")
    questions = [name for name in _QUESTION if name in row]
    if "messages" in row and questions:
        raise ValueError(f"has both 'messages' and {questions[0]!r}; must have one of them")
    messages = _listed(row["messages"]) if "messages" in row else _single(row)
    roles = [message.role for message in messages]
    if _ANSWER not in roles:
        raise ValueError(f"has no answer: no message of the role {_ANSWER!r}")
    if roles[-1] != _ANSWER:
        raise ValueError(f"ends without an answer: its last message is of the role {roles[-1]!r}")
    if "user" not in roles[: roles.index(_ANSWER)]:
        raise ValueError("begins with an answer: no message of the role 'user' before it")
    return messages


def _listed(messages: Any) -> list[Message]:
    """The messages of the field `messages`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"'messages' must be a list of messages, not {_shown(messages)}")
    found = []
    for number, message in enumerate(messages, start=1):
        at = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{at}: must have 'role' and 'content', is {_shown(message)}")
        if message["role"] not in ROLES:
            role = _shown(message["role"])
            raise ValueError(f"{at}: unknown role {role}; must be one of {', '.join(ROLES)}")
        found.append(Message(message["role"], _content(message["content"], f"{at}: 'content'")))
    return found


def _single(row: dict[str, Any]) -> list[Message]:
    """The question and the answer of a row with a field for each."""
    question, reply = (_one_of(names, row) for names in (_QUESTION, _REPLY))
    asked = _content(row[question], repr(question))
    if row.get("input") not in (None, ""):  # many rows have an empty one
        asked += "\n\n" + _content(row["input"], "'input'")
    return [Message("user", asked), Message(_ANSWER, _content(row[reply], repr(reply)))]


def _one_of(names: tuple[str, str], row: dict[str, Any]) -> str:
    """The field that a row has of two names for it."""
    there = [name for name in names if name in row]
    if len(there) == 1:
        return there[0]
    if there:
        raise ValueError(f"has both {names[0]!r} and {names[1]!r}; must have one of them")
    fields = ", ".join(map(str, list(row)[:6])) or "none"
    wanted = f"{names[0]!r} or {names[1]!r}"
    if names is _QUESTION:
        wanted = f"'messages', {wanted}"
    raise ValueError(f"needs a field {wanted} (its fields: {fields})")


def _content(text: Any, name: str) -> str:
    """The text of a message."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {_shown(text)}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    check_unicode(name, text)
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def to_text(messages: Sequence[Message]) -> str:
    """A conversation as JSON: the same for the same messages, different for others."""
    return json.dumps([list(message) for message in messages], ensure_ascii=False)


def from_text(text: str) -> list[Message]:
    """The conversation that `to_text` wrote."""
    return [Message(role, content) for role, content in json.loads(text)]


def pieces(messages: Sequence[Message]) -> list[Piece]:
    """The parts of a conversation that are tokenised: context and answers in turn.

    The end-of-text token that follows each answer is not in them.
    """
    found = []
    context = ""
    for role, content in messages:
        if role in _CONTEXT:
            context += _CONTEXT[role].format(content)
            continue
        found += [Piece(context + _BEFORE_ANSWER, False), Piece(f" {content}", True)]
        context = ""
    if context:
        found.append(Piece(context, False))
    return found


def pieces_of_text(text: str) -> list[Piece]:
    """The pieces of a document's text, see `to_text`."""
    return pieces(from_text(text))


def join(encoded: Sequence[Sequence[int]], parts: Sequence[Piece], eos_id: int) -> np.ndarray:
    """Tokens of a document, with the marks of `packing`; its end-of-text token is left to packing.

    Args:
      encoded: the ids of each piece.
      parts: the pieces.
      eos_id: of the end-of-text token, which follows each answer.
    """
    tokens: list[int] = []
    for ids, piece in zip(encoded, parts, strict=True):
        if tokens and not piece.counts:  # an answer came before
            tokens.append(eos_id | packing.WITHIN)
        tokens += ids if piece.counts else [i | packing.CONTEXT for i in ids]
    return np.array(tokens, np.int32)


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens after which a model that was trained on conversations writes the next answer.

    They begin, as every document does, with an end-of-text token.

    Args:
      tokenizer: the model's.
      messages: so far; the last one is not an answer.

    Raises:
      ValueError: if there is no message, or the last one is an answer.
    """
    if not messages or messages[-1].role == _ANSWER:
        raise ValueError("messages: must end with one of the role 'user'")
    parts = pieces([*messages, Message(_ANSWER, "")])[:-1]
    encoded = tokenizer.encode_batch([piece.text for piece in parts])
    tokens = join(encoded, parts, tokenizer.eos_id)
    return [tokenizer.eos_id, *packing.ids_of(tokens).tolist()]

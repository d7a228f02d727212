"""Small tasks with exact answers: the conversations that need no download (the corpus `tasks`).

They are enumerated by formula, the same on every machine: 864 of them in five domains.  They are
for tests and first steps in fine-tuning; a small model learns the form of an answer from them, and
part of the content.
"""

from collections.abc import Iterator

from dsmoe_jax.data import chat
from dsmoe_jax.data.chat import Message
from dsmoe_jax.data.documents import Document

_WORDS = (
    "water", "stone", "river", "house", "table", "light", "green", "paper", "music", "bread",
    "horse", "chair", "ocean", "plant", "storm", "glass", "metal", "north", "south", "night",
    "cloud", "field", "tower", "wheel", "knife", "sugar", "train", "grass", "beach", "money",
    "dream", "smoke", "sheep", "maple", "spoon", "candle",
)  # fmt: skip
_NUMBERS = 18


def arithmetic() -> Iterator[Document]:
    """Sums of two numbers; those of the same two are on one side of the split."""
    for a in range(_NUMBERS):
        for b in range(_NUMBERS):
            answer = f"{a} plus {b} is {a + b}."
            pair = f"{min(a, b)} {max(a, b)}"
            yield _task(f"What is {a} plus {b}?", answer, pair)


def letters() -> Iterator[Document]:
    """First letter, last letter and number of letters of a word; a word is on one side."""
    for word in _WORDS:
        yield _task(f'What is the first letter of "{word}"?', f'It is "{word[0]}".', word)
        yield _task(f'What is the last letter of "{word}"?', f'It is "{word[-1]}".', word)
        yield _task(f'How many letters has "{word}"?', f"It has {len(word)}.", word)


def order() -> Iterator[Document]:
    """Which of two words comes first in a dictionary."""
    for i, word in enumerate(_WORDS):
        for j in (1, 5, 7, 11, 13):
            other = _WORDS[(i + j) % len(_WORDS)]
            first = min(word, other)
            yield _task(f"Which comes first, {word} or {other}?", f"{first} comes first.")


def repetition() -> Iterator[Document]:
    """A word, then the same again: two questions and two answers."""
    for i, word in enumerate(_WORDS):
        for times in (2, 3, 4):
            other = _WORDS[(i + times) % len(_WORDS)]
            messages = []
            for said in (word, other):
                messages.append(Message("user", f"Say {said} {times} times."))
                messages.append(Message("assistant", " ".join([said] * times) + "."))
            yield Document(chat.to_text(messages))


def comparison() -> Iterator[Document]:
    """The larger of two numbers."""
    for a in range(_NUMBERS):
        for step in (1, 2, 3, 5, 7, 11, 13, 17):
            b = (a + step) % _NUMBERS
            yield _task(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.")


def _task(question: str, answer: str, group: str | None = None) -> Document:
    messages = [Message("user", question), Message("assistant", answer)]
    return Document(chat.to_text(messages), group)

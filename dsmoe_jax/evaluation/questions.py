r"""Questions with known answers, and files of one's own with them.

The rows of a file are all like the first or all like the second of these:

    {"context": "Question: 2 + 3?\nAnswer:", "choices": [" 4", " 5"], "label": 1}
    {"context": "The capital of France is", "answer": " Paris"}

where `label` is the number of the right choice, from 0.  Texts are taken as they are: a choice that
follows a word begins with its own blank.  Other fields are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsmoe_jax.config.checks import require
from dsmoe_jax.data.text_formats import NotJSON, check_unicode, rows_of
from dsmoe_jax.evaluation.likelihood import Request

_BETWEEN_SHOTS = "\n\n"


class Question(NamedTuple):
    """A question; without a choice if there is one request.

    Attributes:
      choices: its possible answers, each after its context.
      label: number of the right one, from 0.
      unconditioned: the same answers after a context that says nothing of the question, to compare
        with; none: there are no such requests.
    """

    choices: tuple[Request, ...]
    label: int
    unconditioned: tuple[Request, ...] = ()

    @property
    def right(self) -> Request:
        """The right answer."""
        return self.choices[self.label]


class QuestionSet(NamedTuple):
    """Questions that are judged together; `shots` answered ones stand before each of them."""

    shots: int
    questions: Sequence[Question]


def answer_of(request: Request) -> str:
    """The text of an answer whose length counts: without the blank before it."""
    return request.continuation.removeprefix(" ")


def read_file(path: Path) -> list[Question]:
    """The questions of a file of rows.

    Raises:
      ValueError: naming file and line, for a row that is no question; naming the file, for one that
        is damaged, has no rows, or rows of both kinds.
    """
    questions = []
    for place, row in rows_of(path):
        try:
            questions.append(_question(row, place))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: has no question")
    if len({len(question.choices) == 1 for question in questions}) > 1:
        raise ValueError(f"{path}: has rows with 'choices' and with 'answer'; must be two files")
    return questions


def with_shots(questions: Sequence[Question], shots: int) -> QuestionSet:
    """The questions after the first `shots`, each with these, answered, before it.

    Raises:
      ValueError: if no question is left.
    """
    want = f"must be less than the {len(questions)} questions: the first ones become the examples"
    require(shots < len(questions), "--shots", shots, want)
    examples = [question.right for question in questions[:shots]]
    before = "".join(one.context + one.continuation + _BETWEEN_SHOTS for one in examples)
    return QuestionSet(shots, [_after(before, question) for question in questions[shots:]])


def _after(before: str, question: Question) -> Question:
    choices = [choice._replace(context=before + choice.context) for choice in question.choices]
    return question._replace(choices=tuple(choices))


def _question(row: Any, place: str) -> Question:
    """The question of a row."""
    if isinstance(row, NotJSON):
        raise ValueError(row.problem)
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with 'context', not {type(row).__name__}")
    context = _text(row, "context", may_be_empty=True)
    if "choices" in row and "answer" in row:
        raise ValueError("has both 'choices' and 'answer'; must have one of them")
    if "choices" not in row:
        return Question((Request(context, _text(row, "answer"), place),), 0)
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("'choices' must be a list of two texts or more")
    texts = [_text({f"choice {i}": text}, f"choice {i}") for i, text in enumerate(choices)]
    label = row.get("label")
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(f"'label' must be a number from 0 to {len(choices) - 1}, not {label!r}")
    return Question(tuple(Request(context, text, place) for text in texts), label)


def _text(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """A field that holds text."""
    if name not in row:
        fields = ", ".join(map(str, list(row)[:6])) or "none"
        wanted = "'choices' or 'answer'" if name == "answer" else repr(name)
        raise ValueError(f"needs a field {wanted} (its fields: {fields})")
    text = row[name]
    if not isinstance(text, str) or not (text or may_be_empty):
        raise ValueError(f"{name!r} must be {'' if may_be_empty else 'non-empty '}text")
    check_unicode(repr(name), text)
    return text

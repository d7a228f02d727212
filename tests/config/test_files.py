"""Config files are found and executed, wherever the command is started."""

import sys
from pathlib import Path

import pytest

import configs
from dsmoe_jax.config import files

REPOSITORY = Path(__file__).parents[2]
MINE = "import ml_collections\ndef get_config({}):\n    return ml_collections.ConfigDict({})\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another current directory, with nothing of the repository on `sys.path`: as an installed
    command has it."""
    monkeypatch.chdir(tmp_path)
    hidden = {"", ".", str(REPOSITORY), str(Path.cwd())}
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in hidden])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_the_argument_is_passed_on():
    assert files.load("configs/dsmoe_2b.py") == configs.load("dsmoe_2b")
    options = "demo,split=2,shared=0"
    assert files.load(f"configs/dsmoe_2b.py:{options}") == configs.load("dsmoe_2b", options)


def test_the_repositorys_files_are_found_from_everywhere(elsewhere):
    (elsewhere / "configs").mkdir()
    before = list(sys.path)
    assert files.load("configs/dsmoe_2b.py:smoke").name == "dsmoe_2b"
    assert sys.path == before


def test_the_current_directory_comes_first(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs/dsmoe_2b.py").write_text(MINE.format("arg", "{'mine': arg}"))
    assert files.load("configs/dsmoe_2b.py:x:y").mine == "x:y"


def test_files_elsewhere(elsewhere):
    """By an absolute path; without an argument; with imports from beside it and from configs/."""
    (elsewhere / "neighbour.py").write_text("NAME = 'beside'\n")
    mine = elsewhere / "mine.py"
    mine.write_text("from configs import base\nimport neighbour\n" + MINE.format("", "{'n': 1}"))
    assert files.load(str(mine)).n == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("configs/dsmo_2b.py:demo", "config=configs/dsmo_2b.py: no such file; did you mean"),
        ("config/dsmoe_2b.py", "did you mean configs/dsmoe_2b.py?"),
        ("configs/nope.py", "no such file; give one of configs/*.py"),
        ("configs", "no such file"),
        ("", "config=: no such file"),
        ("configs/base.py", "config=configs/base.py: has no get_config(arg)"),
        ("configs/dsmoe_2b.py:demmo", "config=configs/dsmoe_2b.py:demmo: scale='demmo': must be"),
        ("none.py", "config=none.py: get_config must return a ConfigDict, not NoneType"),
        ("bug.py", "config=bug.py: ZeroDivisionError: division by zero"),
        ("syntax.py", "config=syntax.py: SyntaxError: "),
        ("bug.py:demo", "config=bug.py:demo: TypeError: get_config() takes 0 positional"),
    ],
)
def test_wrong_files_are_refused_in_one_line(spec, says, elsewhere):
    (elsewhere / "none.py").write_text("def get_config():\n    pass\n")
    (elsewhere / "bug.py").write_text("def get_config():\n    1 / 0\n")
    (elsewhere / "syntax.py").write_text("def get_config(:\n")
    with pytest.raises(ValueError, match=r".") as error:
        files.load(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)

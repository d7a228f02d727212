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


def config_of(folder, width):
    """A config file and the neighbour that it imports."""
    folder.mkdir(parents=True)
    (folder / "sizes.py").write_text(f"WIDTH = {width}\n")
    (folder / "mine.py").write_text("import sizes\n" + MINE.format("", "{'n': sizes.WIDTH}"))
    return folder / "mine.py"


def test_each_file_has_the_neighbours_of_its_own_folder(elsewhere):
    """The second one is not given what the first one imported, and nothing is left behind."""
    before = dict(sys.modules)
    first, second = config_of(elsewhere / "a", 1), config_of(elsewhere / "b", 2)
    assert [files.load(str(file)).n for file in (first, second, first)] == [1, 2, 1]
    assert files.load("b/mine.py").n == 2
    assert sys.modules.keys() - before.keys() <= {"ml_collections"}


@pytest.mark.parametrize("package", [True, False])
def test_configs_of_its_own(elsewhere, package):
    """A copy of configs/ is built by its own base; what it lacks is the repository's."""
    own = elsewhere / "deep/configs"
    own.mkdir(parents=True)
    if package:
        (own / "__init__.py").write_text("")
    (own / "base.py").write_text("SCALE = 'my own'\n")
    (own / "gshard_2b.py").write_text("NAME = 'mine too'\n")
    (own / "mine.py").write_text(
        "from configs import base, gshard_2b\n"
        + MINE.format("", "{'scale': base.SCALE, 'name': gshard_2b.NAME}")
    )
    config = files.load(str(own / "mine.py"))
    assert (config.scale, config.name) == ("my own", "mine too")
    (own / "gshard_2b.py").unlink()
    (own / "base.py").unlink()
    (own / "mine.py").write_text(
        "from configs import gshard_2b\ndef get_config():\n"
        "    return gshard_2b.get_config('smoke')\n"
    )
    assert files.load(str(own / "mine.py")).name == "gshard_2b"
    assert files.load("configs/gshard_2b.py:demo").scale == "demo", "ours are ours again"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("configs/dsmo_2b.py:demo", "config=configs/dsmo_2b.py: no such file; did you mean"),
        ("config/dsmoe_2b.py", "did you mean configs/dsmoe_2b.py?"),
        ("configs/nope.py", "no such file; give one of configs/*.py"),
        ("configs", "no such file"),
        ("", "config=: no such file"),
        ("gs://bucket/mine.py", "config=gs://bucket/mine.py: must be a path of a mounted"),
        ("configs/base.py", "config=configs/base.py: has no get_config(arg)"),
        ("configs/dsmoe_2b.py:demmo", "config=configs/dsmoe_2b.py:demmo: scale='demmo': must be"),
        ("none.py", "config=none.py: get_config must return a ConfigDict, not NoneType"),
        ("bug.py", "config=bug.py: ZeroDivisionError: division by zero"),
        ("syntax.py", "config=syntax.py: SyntaxError: "),
        ("exit.py", "config=exit.py: SystemExit: 3"),
        ("bug.py:demo", "config=bug.py:demo: TypeError: get_config() takes 0 positional"),
    ],
)
def test_wrong_files_are_refused_in_one_line(spec, says, elsewhere):
    (elsewhere / "none.py").write_text("def get_config():\n    pass\n")
    (elsewhere / "bug.py").write_text("def get_config():\n    1 / 0\n")
    (elsewhere / "exit.py").write_text("import sys\nsys.exit(3)\n")
    (elsewhere / "syntax.py").write_text("def get_config(:\n")
    with pytest.raises(ValueError, match=r".") as error:
        files.load(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)

"""`python -m dsmoe_jax` lists its commands at once, and starts the one that is named."""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dsmoe_jax import commands
from tests.tools.forked import run_all
from tests.tools.patience import PATIENCE

REPOSITORY = Path(__file__).parents[2]
# What is no command: what they share, and the one that `python -m experiments.NAME` gives its name.
SHARED = {
    "command_line", "console", "experiment", "generation_report", "ledger", "text_flags",
    "text_printer",
}  # fmt: skip
LIST = """
import sys
from dsmoe_jax import commands
sys.argv = ["dsmoe_jax"]
commands.main()
assert not {"jax", "absl", "numpy"} & sys.modules.keys()
"""
# A flag that the manual of each command explains.
FLAGS = {
    "train": ("--workdir", "--[no]distributed", "--config", "--config.train.seed=1"),
    "status": ("status runs/dsmoe", "--workdir", "--[no]json"),
    "evaluate": ("--workdir", "--record_routing", "--as_task", "hellaswag", "--[no]json"),
    "generate": ("--prompt", "--task", "--top_p", "--num_samples", "--mesh", "an empty prompt"),
    "count": ("--config=configs/dsmoe_16b.py:paper", "--[no]json", "--[no]all"),
    "plan": ("--chip", "--chips", "--config"),
    "aot": ("--topology", "--[no]json"),
    "convert": ("--from_hf", "--to_hf", "--[no]check", "--against", "--mesh"),
    "economics": ("--config", "--chip", "--prices", "--[no]json"),
    "surgery": ("--from", "--to", "--moments", "--loads", "  extract_task  Make a dense"),
    "analyse": ("--workdir", "--to", "--corpus", "--replay_routing", "--max_tokens", "--[no]json"),
    "prepare_data": ("--corpus", "--vocab_size", "--domains", "--rows", "--shards", "--merge"),
    "plot_load": ("--workdir", "--out"),
}


@pytest.fixture(scope="module")
def manuals():
    found = run_all([*([name, "--help"] for name in commands.COMMANDS), ["help", "count"]])
    return dict(zip((*commands.COMMANDS, "help count"), found, strict=True))


def test_every_command_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert modules - SHARED == set(commands.COMMANDS) == set(FLAGS)


def test_listing_imports_nothing_slow():
    done = subprocess.run(
        [sys.executable, "-c", LIST], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    for name, purpose in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"]])
def test_ways_to_ask_for_the_list(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsmoe_jax", *arguments])
    commands.main()
    assert "prepare_data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "'trian': no such command; did you mean train?"),
        (["prepare-data"], "did you mean prepare_data?"),
        (["help", "evalute"], "did you mean evaluate?"),
        (["xyzzy"], "there are train, evaluate"),
        (["command_line"], "no such command"),
        (["--config=configs/dsmoe_2b.py", "train"], "the command comes before its flags"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsmoe_jax", *arguments])
    with pytest.raises(SystemExit) as left:
        commands.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert says in err


@pytest.mark.parametrize("name", FLAGS)
def test_manuals_explain(name, manuals):
    code, out, err = manuals[name]
    assert (code, err) == (0, "")
    assert f"python -m dsmoe_jax {name}" in out
    for text in FLAGS[name]:
        assert text in out


def test_help_of_a_command(manuals):
    assert manuals["help count"] == manuals["count"]


def test_the_console_script_is_the_same():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["dsmoe"].partition(":")
    assert getattr(importlib.import_module(module), function) is commands.main


def test_configs_and_experiments_are_installed_too():
    """Commands find them in every folder."""
    tool = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    for top in ("dsmoe_jax", "configs", "experiments"):
        for folder in {path.parent for path in (REPOSITORY / top).rglob("*.py")}:
            assert (folder / "__init__.py").is_file()
            name = ".".join(folder.relative_to(REPOSITORY).parts)
            assert any(fnmatch(name, form) for form in tool["packages"]["find"]["include"])


def test_as_users_call_it():
    command = [sys.executable, "-m", "dsmoe_jax", "count", "--config=configs/dsmoe_2b.py:smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dsmoe_2b:smoke" in done.stdout

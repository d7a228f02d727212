"""A wrong command line gives one line that says what would be right, and exit code 2."""

import json
import subprocess
import sys

import pytest

from dsmoe_jax.commands import command_line

FILE = "--config=configs/dsmoe_2b.py:smoke"
MOE = "--config.model.moe."

# Command line -> what its one line says (None: the command succeeds).
CASES = {
    f"{FILE} --config.model.hiden_size=1": "did you mean --config.model.hidden_size?",
    f"{FILE} --config.modle.hidden_size=1": "did you mean --config.model.hidden_size?",
    f"{FILE} --config.seed=1": "did you mean --config.train.seed?",
    f"{FILE} --config.model.xyzzy=1": "no such key; see dsmoe_jax/config.py",
    f"{FILE} --config.model.hidden_size=wide": "invalid literal for int() with base 10: 'wide'",
    f"{FILE} {MOE}num_experts_per_tok=64": "cannot exceed the n_routed_experts=63",
    f"{FILE} {MOE}router=best": "must be one of",
    f"{FILE} --config.model.attention.num_key_value_heads=3": "must divide num_attention_heads=2",
    "--config=configs/dsmoe_2b.py:demmo": "did you mean demo?",
    "--config=configs/dsmoe_2b.py:demo,sharde=2": "known: split, shared",
    "--config=configs/dsmo_2b.py": "did you mean configs/dsmoe_2b.py?",
    "--config=config/dsmoe_2b.py": "did you mean configs/dsmoe_2b.py?",
    "--config=configs/nope.py": "give one of configs/*.py",
    "--config=configs/base.py": "has no get_config",
    "--config": "no such file",
    "--config.model.hidden_size=2": "--config: missing",
    "--jsn": "did you mean --json?",
    "--xyzzy": "no such flag; see --help",
    f"{FILE} smoke": "unexpected argument",
    f"{FILE} --config.model.attention.rope_theta=500": None,
    f"{FILE} --config.optimizer.decay_at=(0.5,0.75)": None,
    "--help": None,
}

# One interpreter for all cases: starting it is the slow part, so each case is a fork of it.
DRIVER = """
import json, os, runpy, sys, tempfile
from dsmoe_jax import accounting
results = {}
for case in json.loads(sys.stdin.read()):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if (child := os.fork()) == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["count", *case.split()]
        try:
            runpy.run_module("dsmoe_jax.count", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code)  # an orderly end takes half a second here
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
    results[case] = (code, *texts)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER],
        input=json.dumps(list(CASES)), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_command_line(results, case):
    code, out, err = results[case]
    says = CASES[case]
    if says is None:
        assert (code, err) == (0, "")
        assert out
    else:
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert says in err


def test_help_explains(results):
    _, out, _ = results["--help"]
    for text in ("--config=configs/dsmoe_16b.py:paper", "--[no]json", "--config.train.seed=1"):
        assert text in out


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(command_line, "_parse", lambda argv: None)
    with pytest.raises(SystemExit) as left:
        command_line.run(interrupted)
    assert left.value.code == 130
    assert "interrupted" in capsys.readouterr().err

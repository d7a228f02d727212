"""A wrong command line gives one line that says what would be right, and exit code 2."""

import pytest

from dsmoe_jax.commands import command_line
from tests.tools.forked import run_all, run_script

FILE = "--config=configs/dsmoe_2b.py:smoke"
MOE = "--config.model.moe."
STAGES = "--config.train.stages."

# Arguments of `count` -> what its one line says (None: the command succeeds).
CASES = {
    f"{FILE} --config.model.hiden_size=1": "--config.model.hiden_size=1: no such key; did you mean"
    " model.hidden_size?",
    f"{FILE} --config.modle.hidden_size=1": "did you mean model.hidden_size?",
    f"{FILE} --config.seed=1": "did you mean train.seed?",
    f"{FILE} {MOE}scoring_func=sigmoid": "did you mean model.moe.router.scoring_func?",
    f"{FILE} {MOE}drop.capacity=1.5": "did you mean model.moe.drop.capacity_factor?",
    f"{FILE} --config.model=3": "must be a section",
    f"{FILE} --config.model.hidden_size=wide": "--config.model.hidden_size='wide': must be a whole",
    f"{FILE} --config.model.hidden_size=None": "--config.model.hidden_size=None: must be a whole",
    f"{FILE} --config.data.corpus=2026": "--config.data.corpus=2026: must be a string",
    f"{FILE} {MOE}balance.expert.schedule=((1,2),(0,1))": "must be pairs",
    f"{FILE} --config.model.hidden_size": "--config.model.hidden_size: must be KEY=VALUE",
    f"{FILE} --config.=1": "--config.=1: must be KEY=VALUE",
    f"{FILE} {MOE}num_experts_per_tok=64": "cannot exceed the n_routed_experts=63",
    f"{FILE} --config.model.attention.num_key_value_heads=3": "must divide num_attention_heads=2",
    "--config=configs/dsmoe_2b.py:demmo": "did you mean demo?",
    "--config=configs/dsmoe_2b.py:demo,sharde=2": "known: split, shared",
    "--config=configs/dsmo_2b.py": "did you mean configs/dsmoe_2b.py?",
    "--config=": "no such file",
    f"{FILE} {STAGES}share=(0.5,0.5) {STAGES}train.seed=(0,1)": "cannot change during a run",
    f"{FILE} {MOE}router.options.k=2": "the topk router does not know it",
    "--config.model.hidden_size=2": "--config: missing",
    "--jsn": "did you mean --json?",
    "--xyzzy": "no such flag; see --help",
    f"{FILE} smoke": "unexpected argument",
    "--flagfile=no/such": "no/such",
    f"{FILE} --config.model.attention.rope_theta=500": None,
    f"{FILE} -config.model.attention.rope_theta=500": None,
    f"{FILE} --config.optimizer.decay_at=(0.5,0.75)": None,
    f"{FILE} --config.optimizer.decay_at=0.5,0.75": None,
    f"{FILE} --config.optimizer.decay_at=()": None,
    f"{FILE} {MOE}drop.capacity_factor=1.25": None,
    f"{FILE} {MOE}router.bias_update_speed=1e-3": None,
    f"{FILE} {MOE}balance.expert=None": None,
    f"{FILE} {MOE}balance.device.factor=0.05 {MOE}expert_groups=9": None,
    f"{FILE} {MOE}balance.expert.schedule=((0,1),(0.5,0))": None,
    f"{FILE} {MOE}router.norm_topk_prob=true": None,
    f"{FILE} {MOE}router.name=sinkhorn {MOE}router.options.iterations=4"
    f" {MOE}balance.expert=None": None,
    f"{FILE} {STAGES}share=(0.5,0.5) {STAGES}model.moe.num_experts_per_tok=(3,7)": None,
    f"{FILE} --config.data.corpus='2026'": None,
    f"{FILE} --config.data.corpus=a/path": None,
    f"{FILE} --config.data.corpus=": None,
    "--config configs/dsmoe_2b.py:smoke --config.train.seed=1": None,
}
K = f"{MOE}num_experts_per_tok="
CHANGES = [f"{K}2", f"{K}4", f"{K}4 {K}2", f"{K}2 {K}4 {K}2"]


@pytest.fixture(scope="module")
def results():
    lines = [*CASES, *(f"{FILE} {changes} --json" for changes in CHANGES)]
    found = run_all([["count", *line.split()] for line in lines])
    return dict(zip((*CASES, *CHANGES), found, strict=True))


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


def test_overrides_count_and_the_last_one_wins(results):
    two, four, *last = (results[changes].out for changes in CHANGES)
    assert two != four
    assert last == [two, two]


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "parse", lambda arguments: None)
    with pytest.raises(SystemExit) as left:
        command_line.run(interrupted, [])
    assert left.value.code == 130
    assert "interrupted" in capsys.readouterr().err


# One of several processes, in which a library waits for the others.
WAITING = """
import sys, threading
import jax
from dsmoe_jax.commands import command_line
from dsmoe_jax.parallel import hosts
jax.distributed.is_initialized = lambda: True
hosts.SHUTDOWN_SECONDS = -9
def main():
    threading.Thread(target=threading.Event().wait).start()
    raise {"OSError": OSError, "KeyError": KeyError}[sys.argv[1]]
command_line.run(main, [])
"""


@pytest.mark.parametrize(("error", "code"), [("OSError", 2), ("KeyError", 1)])
def test_one_of_several_that_fails_does_not_wait_for_the_others(tmp_path, error, code):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    assert run_script(script, error).code == code

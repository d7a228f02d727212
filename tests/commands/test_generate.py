"""`python -m dsmoe_jax generate` on a run of a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.training.loop import train
from tests.tools.patience import PATIENCE


@pytest.fixture(scope="module")
def workdir(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeekMoE with few experts after two steps (checkpoints 1 and 2)."""
    config = replace(
        from_config_dict(configs.load("dsmoe_2b", "smoke,split=1")),
        **{
            "model.hidden_size": 16, "model.num_hidden_layers": 1, "model.attention.head_dim": 8,
            "model.initializer_range": 0.3, "model.moe.n_routed_experts": 4,
            "model.moe.moe_intermediate_size": 8, "model.moe.expert_backend": "loop",
            "model.moe.evaluation_drop.capacity_factor": 1.0, "model.vocab_size": 16384,
            "data.corpus": str(tiny_corpus),
            "optimizer.peak_learning_rate": 0.3, "optimizer.warmup_steps": 0,
            "train.steps": 2, "train.checkpoint_every": 1, "train.eval_every": None,
        },
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "few_steps"
    train(config, path, progress=False)
    saved = json.loads((path / "config.json").read_text())
    saved["data"]["corpus"] = str(path / "gone")  # no corpus is needed
    (path / "config.json").write_text(json.dumps(saved))
    return path


# Line of arguments -> (exit code, stdout, stderr).  Flags are the process's own, so the cases run
# in one other process, where the model is compiled once for all cases of equal shapes.
DRIVER = """
import contextlib, io, json, sys
import numpy as np
from absl import flags
from dsmoe_jax.commands import command_line, generate
from dsmoe_jax.data.corpus import load_corpus
cases, cuts = json.load(sys.stdin)
results = []
for argv in cases:
    out, err = io.StringIO(), io.StringIO()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run(generate.main, argv)
        except SystemExit as stop:
            results.append((stop.code, out.getvalue(), err.getvalue()))
directory, *rows = cuts
tokenizer = load_corpus(directory).tokenizer
json.dump([results, [generate.cut(np.array(row), tokenizer) for row in rows]], sys.stdout)
"""

SAMPLED = ("--prompt=def ", "--temperature=2", "--json", "--max_new_tokens=8", "--num_samples=3")
GOOD = {
    "greedy": ("--prompt=def ", "--max_new_tokens=8"),
    "greedy again": ("--prompt=def ", "--max_new_tokens=8"),
    "seed 0": SAMPLED,
    "seed 0 again": (*SAMPLED, "--seed=0"),
    "seed 1": (*SAMPLED, "--seed=1"),
    "first checkpoint": (*SAMPLED, "--step=1"),
    "numbered": tuple(a for a in SAMPLED if a != "--json"),
    "empty prompt": ("--prompt=", "--max_new_tokens=8", "--json"),
    "any token": ("--prompt=", "--temperature=1e30", "--max_new_tokens=60", "--json"),
    "past the end": ("--prompt=", "--max_new_tokens=64"),
}
BAD = {
    ("--prompt=x", "--workdir="): "--workdir: missing",
    ("--prompt=x", "--workdir=no/such"): "holds no run",
    (): "--prompt: missing; --prompt='' starts a new document",
    ("--prompt=\udcff",): r"--prompt='\udcff': must be UTF-8",
    ("--prompt=x", "--step=7"): "--step=7: no such checkpoint; there are [1, 2]",
    ("--prompt=x", "--max_new_tokens=0"): "--max_new_tokens=0",
    ("--prompt=x", "--max_new_tokens=many"): "--max_new_tokens=many",
    ("--prompt=x", "--temperature=-1"): "--temperature=-1",
    ("--prompt=x", "--temperature=nan"): "--temperature=nan: must be finite",
    ("--prompt=x", "--temperature=1", "--top_p=0"): "--top_p=0.0: must be above 0 and at most 1",
    ("--prompt=x", "--temperature=1", "--top_p=1.5"): "--top_p=1.5: must be above 0",
    ("--prompt=x", "--top_p=0.5"): "--top_p=0.5: changes nothing at --temperature=0",
    ("--prompt=x", "--num_samples=2"): "--num_samples=2: changes nothing at --temperature=0",
    ("--prompt=x", "--num_samples=0"): "--num_samples=0",
    ("--prompt=x", "--seed=-1"): "--seed=-1",
    ("--promt=x",): "did you mean --prompt?",
}


@pytest.fixture(scope="module")
def driven(workdir, tiny_corpus):
    """Results of the cases by name or arguments, and what `cut` leaves of three rows of tokens."""
    cases = {**GOOD, **{argv: argv for argv in BAD}}
    lines = [
        argv if any(a.startswith("--workdir") for a in argv) else (*argv, f"--workdir={workdir}")
        for argv in cases.values()
    ]
    tokenizer = load_corpus(tiny_corpus).tokenizer
    text, eos = tokenizer.encode("import os"), tokenizer.eos_id
    rows = [text, [*text, eos, *text, eos], [eos, *text]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER],
        input=json.dumps([lines, [str(tiny_corpus), *rows]]),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, cuts = json.loads(done.stdout)
    return dict(zip(cases, results, strict=True)), cuts, len(text)


@pytest.fixture
def results(driven):
    return driven[0]


@pytest.mark.parametrize("name", GOOD)
def test_good(results, name):
    code, out, err = results[name]
    assert code == 0
    assert out
    *other, line = err.splitlines()
    assert line.startswith("note: nothing is dropped here")
    assert bool(other) == (name == "past the end")


def test_greedy_is_the_same_on_every_call(results):
    assert results["greedy"] == results["greedy again"]
    assert results["greedy"][1].startswith("def ")


def test_samples_follow_the_seed_and_the_checkpoint(results):
    texts = {
        name: [sample["text"] for sample in json.loads(results[name][1])["samples"]]
        for name in ("seed 0", "seed 0 again", "seed 1", "first checkpoint")
    }
    assert texts["seed 0"] == texts["seed 0 again"]
    assert texts["seed 0"] != texts["seed 1"]
    assert texts["seed 0"] != texts["first checkpoint"]
    assert len(set(texts["seed 0"])) == 3, "the samples of one call differ"


def test_several_samples_are_numbered(results):
    found = json.loads(results["seed 0"][1])
    assert (found["step"], found["prompt"]) == (2, "def ")
    texts = ["def " + sample["text"] for sample in found["samples"]]
    expected = "\n".join(f"[{i}/3]\n{text}" for i, text in enumerate(texts, start=1))
    assert results["numbered"][1] == expected + "\n"


def test_an_empty_prompt_starts_a_new_document(results):
    (sample,) = json.loads(results["empty prompt"][1])["samples"]
    assert sample["tokens"] == 8 or sample["ended"]


def test_every_token_is_text(results):
    """The model has ids past the tokenizer's; a character has at most four bytes, a token one."""
    (sample,) = json.loads(results["any token"][1])["samples"]
    assert len(sample["text"]) >= sample["tokens"] / 4 > 10


def test_past_the_trained_length_there_is_a_note(results):
    assert (
        "1 + 64 tokens go past the 64 that the model was trained on" in results["past the end"][2]
    )


@pytest.mark.parametrize("argv", BAD, ids=" ".join)
def test_bad_input_gives_one_line(results, argv):
    code, out, err = results[argv]
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD[argv] in err


def test_text_is_cut_at_the_first_end_of_text(driven):
    _, cuts, n = driven
    assert cuts == [["import os", n, False], ["import os", n, True], ["", 0, True]]


def test_the_command_as_users_call_it(workdir, results):
    command = [sys.executable, "-W", "ignore", "-m", "dsmoe_jax", "generate"]
    arguments = [f"--workdir={workdir}", *GOOD["greedy"]]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == tuple(results["greedy"])


def test_help_explains():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dsmoe_jax", "generate", "--help"],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0
    for text in (
        "an empty prompt",
        "--workdir=runs/dsmoe",
        "--top_p",
        "--num_samples",
        "--[no]json",
    ):
        assert text in done.stdout

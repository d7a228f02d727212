"""`python -m dsmoe_jax generate` on a run of a few steps."""

import json
import re
from pathlib import Path

import pytest

import configs
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.training.loop import train
from tests.tools.forked import run_all, run_script


@pytest.fixture(scope="module")
def workdir(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeekMoE with few experts after two steps (checkpoints 1 and 2)."""
    config = replace(
        from_config_dict(configs.load("dsmoe_2b", "smoke,split=1")),
        **{
            "model.hidden_size": 16, "model.num_hidden_layers": 1, "model.attention.head_dim": 8,
            "model.mtp.num_nextn_predict_layers": 1, "model.initializer_range": 0.3,
            "model.moe.n_routed_experts": 4,
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
from absl import flags
from dsmoe_jax.commands import command_line, generate
cases = json.loads(sys.argv[1])
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
json.dump(results, sys.stdout)
"""

SAMPLED = ("--prompt=def ", "--temperature=2", "--json", "--max_new_tokens=8", "--num_samples=3")
GOOD = {
    "greedy": ("--prompt=def ", "--max_new_tokens=8"),
    "greedy again": ("--prompt=def ", "--max_new_tokens=8"),
    "drafted": ("--prompt=def ", "--max_new_tokens=8", "--draft=mtp"),
    "seed 0": SAMPLED,
    "seed 0 again": (*SAMPLED, "--seed=0"),
    "seed 1": (*SAMPLED, "--seed=1"),
    "first checkpoint": (*SAMPLED, "--step=1"),
    "numbered": tuple(a for a in SAMPLED if a != "--json"),
    "streamed": (*(a for a in SAMPLED if a != "--json"), "--stream"),
    "stopped": (*SAMPLED, "--stop=e", "--stop=n"),
    "several prompts": ("--prompt=def ", "--prompts_file={prompts}", *SAMPLED[1:], "--top_k=50"),
    "empty prompt": ("--prompt=", "--max_new_tokens=8", "--json"),
    "any token": ("--prompt=", "--temperature=1e30", "--max_new_tokens=60", "--json"),
    "a question": ("--prompt=hi", "--chat", "--max_new_tokens=8", "--json"),
    "a question, as text": ("--prompt=hi", "--chat", "--max_new_tokens=8"),
    "as it is put": ("--prompt=User: hi\n\nAssistant:", "--max_new_tokens=8", "--json"),
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
    ("--prompt=x", "--top_k=3"): "--top_k=3: changes nothing at --temperature=0",
    ("--prompt=x", "--top_k=0"): "--top_k=0: must be > 0",
    ("--prompt=x", "--repetition_penalty=0"): "--repetition_penalty=0.0: must be above 0",
    ("--prompt=x", "--stop="): "--stop='': must not be empty",
    ("--prompt=x", "--stop=\udcff"): r"--stop='\udcff': must be UTF-8",
    ("--prompt=x", "--stream", "--json"): "--stream=true: JSON is printed when all is done",
    ("--prompt=x", "--draft=mtp", "--stream"): "--stream=true: a drafted text comes as a whole",
    ("--prompt=x", "--draft=mtp", "--temperature=1"): "--draft=mtp: drafts greedy text alone",
    ("--prompt=x", "--draft=small"): "--draft=small",
    ("--prompt= ", "--chat"): "--prompt='': with --chat it is a question",
    ("--prompts_file=no/such",): "--prompts_file=no/such: No such file",
    ("--prompts_file={damaged}",): "damaged: line 2 must be a JSON string",
    ("--prompts_file={latin}",): "latin: must be UTF-8",
    ("--promt=x",): "did you mean --prompt?",
}


FILES = {
    "prompts": b'"import os\\nimport sys"\n""\n',
    "damaged": b'"import"\nimport\n',
    "latin": b'"\xe9"',
}


@pytest.fixture(scope="module")
def results(workdir, tmp_path_factory):
    """Results of the cases by name or arguments."""
    directory = tmp_path_factory.mktemp("files")
    files = {name: str(directory / name) for name in FILES}
    for name, content in FILES.items():
        Path(files[name]).write_bytes(content)
    cases = {**GOOD, **{argv: argv for argv in BAD}}
    lines = [[a.format(**files) if "=" in a else a for a in argv] for argv in cases.values()]
    for line in lines:
        if not any(a.startswith("--workdir") for a in line):
            line.append(f"--workdir={workdir}")
    script = directory / "driver.py"
    script.write_text(DRIVER)
    done = run_script(script, json.dumps(lines))
    assert done.code == 0, done.err
    return dict(zip(cases, json.loads(done.out), strict=True))


def samples_of(results, name):
    return json.loads(results[name][1])["samples"]


@pytest.mark.parametrize("name", GOOD)
def test_good(results, name):
    code, out, err = results[name]
    assert code == 0
    assert out
    lines = err.splitlines()
    if name == "drafted":
        assert re.fullmatch(r"draft: accepted \d of \d tokens by module, in \d passes", lines.pop())
    if "--json" not in GOOD[name]:
        *lines, speed, weights, cache = lines
        assert re.fullmatch(
            r"speed: prefill \d+ tokens in \S+ s \([\d,]+ tokens/s\), decode \d+ tokens in \S+ s"
            r" \([\d,]+ tokens/s\); compiling took \S+ s besides",
            speed,
        )
        assert cache.startswith("cache: ")
        assert re.fullmatch(r"weights: [\d,]+ bytes", weights)
    *other, line = lines
    assert line.startswith("note: nothing is dropped here")
    assert bool(other) == (name == "past the end")


def test_greedy_is_the_same_on_every_call(results):
    assert results["greedy"][1] == results["greedy again"][1] == results["drafted"][1]
    assert results["greedy"][1].startswith("def ")


def test_samples_follow_the_seed_and_the_checkpoint(results):
    texts = {
        name: [sample["text"] for sample in samples_of(results, name)]
        for name in ("seed 0", "seed 0 again", "seed 1", "first checkpoint")
    }
    assert texts["seed 0"] == texts["seed 0 again"]
    assert texts["seed 0"] != texts["seed 1"]
    assert texts["seed 0"] != texts["first checkpoint"]
    assert len(set(texts["seed 0"])) == 3, "the samples of one call differ"


def test_several_samples_are_numbered_and_streaming_writes_the_same(results):
    assert json.loads(results["seed 0"][1])["step"] == 2
    texts = [sample["prompt"] + sample["text"] for sample in samples_of(results, "seed 0")]
    assert all(text.startswith("def ") for text in texts)
    expected = "\n".join(f"[{i}/3]\n{text}" for i, text in enumerate(texts, start=1))
    assert results["numbered"][1] == results["streamed"][1] == expected + "\n"


def test_each_prompt_has_its_samples(results):
    samples = samples_of(results, "several prompts")
    prompts = ["def ", "import os\nimport sys", ""]
    assert [sample["prompt"] for sample in samples] == [p for p in prompts for _ in range(3)]
    assert len({sample["text"] for sample in samples}) == 9


def test_a_text_ends_before_a_stop_string(results):
    """Which does not change what comes before."""
    reasons = set()
    for whole, cut in zip(*(samples_of(results, n) for n in ("seed 0", "stopped")), strict=True):
        text = re.split("e|n", whole["text"])[0]
        assert cut["text"] == text
        reasons.add(cut["stop_reason"])
        assert (cut["stop_reason"] == "stop_string") == (text != whole["text"])
        assert cut["tokens"] <= whole["tokens"]
        assert cut["ended"] == (cut["stop_reason"] != "max_new_tokens")
    assert "stop_string" in reasons


def test_speed_and_cache_are_reported(results):
    """The cache: keys and values of the model's two heads of 8 numbers, in float32."""
    found = json.loads(results["seed 0"][1])
    speed, cache = found["speed"], found["cache"]
    generated = sum(s["tokens"] + (s["stop_reason"] == "end_of_text") for s in found["samples"])
    assert speed["decode_tokens"] == generated - 3
    assert speed["prefill_tokens"] % 3 == 0
    for part in ("prefill", "decode"):
        rate = speed[f"{part}_tokens"] / speed[f"{part}_seconds"]
        assert speed[f"{part}_tokens_per_second"] == pytest.approx(rate)
    assert speed["compile_seconds"] > 0
    assert cache["bytes_per_token"] % (4 * 2 * 8) == 0
    assert f"cache: {cache['bytes_per_token']:,} bytes" in results["numbered"][2]


def test_an_empty_prompt_starts_a_new_document(results):
    (sample,) = samples_of(results, "empty prompt")
    assert sample["tokens"] == 8 or sample["ended"]


def test_a_question_is_put_as_in_training(results):
    found = [samples_of(results, name) for name in ("a question", "as it is put")]
    assert [sample.pop("prompt") for (sample,) in found] == ["hi", "User: hi\n\nAssistant:"]
    assert found[0] == found[1]
    ((sample,), _) = found
    written = f"User: hi\n\nAssistant:{sample['text']}\n"
    assert results["a question, as text"][1] == written


def test_every_token_is_text(results):
    """The model has ids past the tokenizer's; a character has at most four bytes, a token one."""
    (sample,) = samples_of(results, "any token")
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


def test_the_command_as_users_call_it(workdir, results):
    (done,) = run_all([("generate", f"--workdir={workdir}", *GOOD["greedy"])])
    assert (done.code, done.out) == (0, results["greedy"][1])


def test_help_explains():
    (done,) = run_all([("generate", "--help")])
    assert done.code == 0
    for text in (
        "an empty prompt",
        "--workdir=runs/dsmoe",
        "--top_p",
        "--num_samples",
        "--prompts_file",
        "--repetition_penalty",
        "12 L D^2",
        "--[no]json",
    ):
        assert text in done.out

"""`python -m dsmoe_jax convert`: flags that belong together, both directions, the agreement."""

import json
import sys

import pytest

from tests.tools.forked import assert_refused, run_all

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

FLAGS = {
    (): "convert needs --from_hf and --to, or --from and --to_hf, or --check and --from_hf; see",
    ("--from_hf=x",): "convert needs --from_hf and --to",
    ("--from_hf=x", "--to=y", "--step=3"): "--step=3: has no meaning beside --from_hf --to",
    ("--from_hf=x", "--to=y", "--dtype=bfloat16"): "--dtype=bfloat16: has no meaning beside",
    ("--from_hf=x", "--to=y", "--tokens=3"): "--tokens=3: has no meaning beside --from_hf --to",
    (
        "--from=x",
        "--to_hf=y",
        "--mesh=fsdp=1",
    ): "--mesh=fsdp=1: has no meaning beside --from --to_hf",
    ("--check", "--from_hf=x", "--to=y"): "--to=y: has no meaning beside --check --from_hf",
    ("--from=no/such", "--to_hf=new"): "--from=no/such: holds no run (there is no config.json)",
    ("--from_hf=no/such", "--to=new"): "--from_hf=no/such: holds no model (there is no config.json",
    ("--from=x", "--to_hf=y", "--shard_gb=0"): "--shard_gb=0.0: must be above 0",
    ("--from=x", "--to_hf=y", "--dtype=int4"): "should be one of <float32|bfloat16>",
    ("--check", "--from_hf=MODEL", "--tokens=1,x"): "--tokens=1,x: must be numbers separated by",
    ("--check", "--from_hf=MODEL", "--tokens=1,64"): "--tokens=64: must be below 64",
    ("--check", "--from_hf=MODEL", "--against=fast"): "model.moe.expert_backend='fast': must be",
    ("--from_hf=MODEL", "--to=MODEL"): "exists already; name a new or empty directory",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "mixtral"
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=8, num_local_experts=4, initializer_range=0.3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def refusals(model):
    cases = [[argument.replace("MODEL", str(model)) for argument in case] for case in FLAGS]
    return dict(zip(FLAGS, run_all([["convert", *case] for case in cases]), strict=True))


@pytest.mark.parametrize("case", FLAGS, ids=" ".join)
def test_refusals(refusals, case):
    assert_refused(refusals[case], FLAGS[case])


def test_there_and_back_and_the_agreement(model, tmp_path):
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    made, written, checked, against = run_all(
        [
            ["convert", f"--from_hf={model}", f"--to={workdir}"],
            ["convert", f"--from={workdir}", f"--to_hf={back}", "--json", "--shard_gb=1e-5"],
            ["convert", "--check", f"--from_hf={model}", "--json", "--tokens=1,5,9,13,17"],
            ["convert", "--check", f"--from={workdir}", "--against=loop"],
        ]
    )
    assert made.code == 0, made.err
    assert made.out.startswith(f"{workdir}: made in ")
    assert "MB as float32 parameters; takes twice the latter on disk" in made.err
    assert "reading mixtral 23/23  ETA 0:00" in made.err
    result = json.loads(written.out)
    assert result["architecture"] == "MixtralForCausalLM"
    assert result["step"] == 0
    assert sys.platform != "linux" or 0 < result["held_memory_bytes"] < 1e8
    assert "MB of float32 in files of up to 0.0" in written.err
    assert " MB; takes up to " in written.err
    assert len(list(back.glob("model-*.safetensors"))) > 1
    agreement = json.loads(checked.out)
    assert agreement["tokens"] == 5
    assert agreement["logits_error"] < 1e-4
    for number, row in enumerate(agreement["layers"]):
        assert row["layer"] == number
        assert row["overlap"] == 1
        assert row["gate_error"] < 1e-5
        assert row["hidden_error"] < 1e-5
    assert [line.split()[:2] for line in against.out.splitlines()[1:3]] == [
        ["0", "100.0000%"],
        ["1", "100.0000%"],
    ]

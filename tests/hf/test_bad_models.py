"""Models that cannot be converted are refused in one line, by key or name; nothing is left."""

import json
import shutil

import pytest
import torch
from against_transformers import draw
from safetensors.torch import load_file, save_file

from dsmoe_jax.hf import loading, workdirs

SETTINGS = {
    "num_key_value_heads": 2, "intermediate_size": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "good"
    draw("mixtral", **SETTINGS).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def refused(directory):
    """The line that a conversion ends with; it leaves nothing behind."""
    before = sorted(directory.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        workdirs.from_hf(str(directory), str(directory.parent / "workdir"))
    assert sorted(directory.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': an architecture that we do not have; must be"),
        ({"model_type": None}, "model_type=None: an architecture that we do not have"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': we do not have that; must be 'silu'"),
        ({"attention_bias": True}, "attention_bias=True: we do not have that; must be False"),
        ({"sliding_window": 4096}, "sliding_window=4096: we do not have that; must be None"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
            "rope_scaling.rope_type='longrope': must be one of ['linear', 'llama3', 'yarn']",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: we rotate whole heads"),
        ({"num_local_experts": "DELETED"}, "num_local_experts=None: missing"),
        ({"num_hidden_layers": "2"}, "model.num_hidden_layers='2': must be a whole number"),
        ({"num_experts_per_tok": 5}, "model.moe.num_experts_per_tok=5: cannot exceed the n_routed"),
    ],
)
def test_configs(copy, changes, message):
    path = copy / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v != "DELETED"}))
    assert f"{path}: {message}" in refused(copy)


def test_a_config_that_is_none(copy):
    (copy / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(copy)
    (copy / "config.json").unlink()
    assert refused(copy) == f"--from_hf={copy}: holds no model (there is no config.json)"


def test_all_wrong_tensors_at_once(copy):
    tensors = load_file(copy / "model.safetensors")
    for e in range(3):
        del tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.norm.weight"] = torch.zeros(17)
    save_file(tensors, copy / "model.safetensors")
    missing = ", ".join(f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(3))
    assert refused(copy) == (
        f"{copy}: tensors 3 missing: {missing}; 1 too many: model.layers.0.self_attn.q_proj.bias;"
        " 1 of another shape: model.norm.weight is (17,), not (16,)"
    )
    save_file({"model.norm.weight": torch.zeros(16)}, copy / "model.safetensors")
    assert refused(copy).endswith(" and 32 more")


def test_files(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-10], content[:50], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        assert f"{file}: not a whole safetensors file (" in refused(copy)
    file.unlink()
    assert "holds no weights (neither model.safetensors nor" in refused(copy)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors of model.safetensors.index.json" in refused(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(copy)


def test_a_dtype_that_we_do_not_read(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    save_file(tensors, copy / "model.safetensors")
    assert "model.norm.weight is of dtype I8; must be one of ['BF16', 'F16'" in refused(copy)


def test_a_tokenizer_of_another_model(copy, tiny_corpus):
    shutil.copy(tiny_corpus / "tokenizer.json", copy / "tokenizer.json")
    assert refused(copy) == (
        f"{copy / 'tokenizer.json'}: has 512 tokens, and the model's vocab_size is 64: it is the"
        " tokenizer of another model"
    )


def test_places_that_are_taken(good, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--to=.*: exists already; name a new or empty directo"):
        workdirs.from_hf(str(good), str(tmp_path))
    with pytest.raises(ValueError, match=r"^--to_hf=.*: exists already"):
        workdirs.to_hf("no/such", str(tmp_path), None, "float32", 10**9)
    with pytest.raises(ValueError, match=r"^--from=no/such: holds no run"):
        workdirs.to_hf("no/such", str(tmp_path / "new"), None, "float32", 10**9)


def test_a_disk_that_is_full(good, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "some file")

    monkeypatch.setattr(workdirs.Checkpoints, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        workdirs.from_hf(str(good), str(tmp_path / "workdir"))
    assert not list(tmp_path.iterdir())


def test_load_says_the_same(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^directory=.*: holds no model"):
        loading.load(copy)

"""Forms of a checkpoint: shards, fused experts, 16 and 8 bits; a mesh; shards that we write."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from against_transformers import draw, in_memory
from safetensors.torch import load_file, save_file

from dsmoe_jax.hf import loading, names, saving
from dsmoe_jax.hf.files import Checkpoint
from dsmoe_jax.progress import Silent

V3 = {
    "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "num_key_value_heads": 4,
}  # fmt: skip


def read(directory):
    source = loading.open_source(directory)
    state = loading.load_state(source, Silent())
    return source, {names.path_of(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(state)}


@pytest.fixture(scope="module")
def model():
    return draw("deepseek_v3", **V3)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """A directory of one file, and the arrays read from it."""
    directory = tmp_path_factory.mktemp("plain")
    model.save_pretrained(directory)
    return directory, read(directory)[1]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_fused_experts(model, plain, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert_same(read(tmp_path)[1], plain[1])


def test_fused_experts_of_mixtral(tmp_path):
    settings = {"num_key_value_heads": 2, "intermediate_size": 8, "num_local_experts": 4}
    model = draw("mixtral", **settings)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert_same(read(tmp_path / "fused")[1], read(tmp_path / "plain")[1])


def test_shards(model, plain, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(read(tmp_path)[1], plain[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(model, plain, tmp_path, dtype):
    kind = getattr(torch, dtype)
    tensors = {k: v.to(kind) for k, v in load_file(plain[0] / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain[0] / "config.json").read_text())
    source, arrays = read(tmp_path)
    wanted = tensors["model.layers.1.mlp.experts.3.up_proj.weight"].float()
    np.testing.assert_array_equal(arrays["layers/moe/up_EFD"][0, 3], wanted.numpy())
    if dtype == "bfloat16":  # which float32 holds exactly: the same bits come back
        (tmp_path / "back").mkdir()
        state = loading.load_state(source, Silent())
        destination = saving.describe(source.config, dtype, source.tree)
        saving.save(destination, in_memory(state), tmp_path / "back", Silent())
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(x, back[name]) for name, x in tensors.items())


def quantised(weight):
    """V3's form (2412.19437 section 3.3): of each 128 x 128 block the largest magnitude is 448."""
    rows, columns = weight.shape
    scale = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
    in_bits = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale[i, j] = np.abs(weight[block]).max() / 448
            in_bits[block] = (weight[block] / scale[i, j]).astype(in_bits.dtype)
    return in_bits, scale


def as_torch(in_bits):
    return torch.tensor(in_bits.view(np.uint8)).view(torch.float8_e4m3fn)


def test_blocks_in_eight_bits(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(300, 260)) * np.exp(rng.normal(size=(300, 1)))
    in_bits, scale = quantised(np.float32(weight))
    whole = np.empty_like(weight)
    for i, j in np.ndindex(*weight.shape):
        whole[i, j] = np.float32(in_bits[i, j]) * scale[i // 128, j // 128]
    tensors = {"w": as_torch(in_bits), "w_scale_inv": torch.tensor(scale)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    everything = slice(None)
    for index in [
        (everything, everything),
        (slice(5, 131), slice(100, 259)),
        (slice(128, 256), everything),
        (slice(299, 300), slice(0, 1)),
    ]:
        np.testing.assert_array_equal(checkpoint.read("w", index), np.float32(whole[index]))
    assert np.abs(whole - weight).max() < 2**-4 * np.abs(weight).max()


def test_a_model_in_eight_bits(model, plain, tmp_path):
    tensors = load_file(plain[0] / "model.safetensors")
    for name in [n for n in tensors if "proj.weight" in n]:
        in_bits, scale = quantised(tensors[name].numpy())
        tensors[name] = as_torch(in_bits)
        tensors[name + "_scale_inv"] = torch.tensor(scale)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain[0] / "config.json").read_text())
    _, arrays = read(tmp_path)
    for path, x in plain[1].items():
        np.testing.assert_allclose(arrays[path], x, atol=2**-4 * np.abs(x).max(), err_msg=path)
    some = "model.layers.0.mlp.up_proj.weight_scale_inv"
    del tensors[some]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensors 1 missing: {some}$"):
        loading.open_source(tmp_path)


def test_written_shards(plain, tmp_path):
    source, arrays = read(plain[0])
    state = loading.load_state(source, Silent())
    destination = saving.describe(source.config, "float32", source.tree)
    saving.save(destination, in_memory(state), tmp_path, Silent(), shard_bytes=5000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert {file.name for file in files} == set(index["weight_map"].values())
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes) == destination.bytes
    assert max(sizes) <= 5000
    assert_same(read(tmp_path)[1], arrays)


@pytest.mark.eight_devices
def test_onto_a_mesh(plain):
    """Each device reads its part: the arrays are those of one device, sharded."""
    from dsmoe_jax.config import MeshConfig
    from dsmoe_jax.parallel.mesh import make_mesh

    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
        source = loading.open_source(plain[0])
        state = loading.load_state(source, Silent())
        n_parts = {}
        for path, x in jax.tree.leaves_with_path(state):
            name = names.path_of(path)
            np.testing.assert_array_equal(np.asarray(x), plain[1][name], err_msg=name)
            n_parts[name] = len({str(shard.index) for shard in x.addressable_shards})
    assert n_parts["layers/moe/gate_EFD"] == 8
    assert n_parts["layers/attention/key_up_NHZ"] == 8  # half of a tensor that holds values, too
    assert n_parts["final_norm/scale_D"] == 1

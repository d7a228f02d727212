"""Attention kernels against torch's attention, whose mask is an array written out here.

Shapes: B sequences, S positions, N query heads, M key/value heads, H and I sizes of key and value.
"""

import functools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.nn.attention import CausalMask, kernel_of
from dsmoe_jax.nn.attention.kernels import KERNELS, Task, choose, cudnn, splash
from dsmoe_jax.training.loop import train
from tests.nn.attention.tpu_program import S as S_OF_PROGRAM
from tests.tools.patience import PATIENCE
from tests.tools.tiny import tiny

B, S, N = 2, 256, 4
ATTEND = {
    **{name: kernel.attend for name, kernel in KERNELS.items()},
    "splash": functools.partial(splash.attend, interpret=platform() != "tpu"),
}
BF16 = jnp.dtype("bfloat16")
TASK = Task("tpu", length=256, key_size=64, value_size=64, dtype=BF16, documents=True)


def find_libtpu():
    """The directory with libtpu, or None: `make test` keeps it apart from the packages."""
    apart = Path(sys.prefix) / "libtpu"
    found = find_spec("libtpu")
    return apart if apart.is_dir() else found and Path(str(found.origin)).parents[1]


def segments(s=S):
    """Documents that end inside of blocks, a short one, and padding at the end of one sequence."""
    ends = np.zeros((B, s), np.int32)
    ends[0, [s // 3, s // 3 + 1]] = 1
    ends[1, [s // 2]] = 1
    segment_ids_BS = 1 + np.cumsum(ends, axis=1, dtype=np.int32)
    segment_ids_BS[1, -s // 4 :] = 0
    return segment_ids_BS


def inputs(m, h, i, s=S):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, s, N, h), (B, s, m, h), (B, s, m, i), (B, s, N, i)]
    return [np.asarray(jax.random.normal(*at)) for at in zip(keys, shapes, strict=True)]


def by_torch(query, key, value, dy, segment_ids_BS):
    """Values and gradients in float64."""
    s = query.shape[1]
    seen_BSL = np.tril(np.ones((s, s), bool)) & np.ones((B, 1, 1), bool)
    if segment_ids_BS is not None:
        seen_BSL &= segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
    y = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in given),
        attn_mask=torch.tensor(seen_BSL)[:, None],
        enable_gqa=True,
    ).transpose(1, 2)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    return [y.detach().numpy(), *(x.grad.numpy() for x in given)]


def check(name, arrays, segment_ids_BS):
    """Values and gradients, those of padding too; NaN is not close."""

    @jax.jit
    def found(query, key, value, dy):
        def run(*qkv):
            return ATTEND[name](*qkv, CausalMask(segment_ids_BS))

        y, back = jax.vjp(run, query, key, value)
        return [y, *back(dy)]

    for got, want in zip(found(*arrays), by_torch(*arrays, segment_ids_BS), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("m", "h", "i", "documents"), [(2, 128, 128, True), (4, 24, 16, True), (1, 16, 40, False)]
)
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_values_and_gradients(name, m, h, i, documents):
    task = TASK._replace(platform=platform(), documents=documents)
    if name == "cudnn" and (reason := KERNELS[name].refuse(task)):
        pytest.skip(reason)
    check(name, inputs(m, h, i), segments() if documents else None)


def test_a_sequence_of_many_blocks(monkeypatch):
    """The causal mask empties three of 3 x 3 blocks, and cuts the three of the diagonal."""
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)
    check("splash", inputs(2, 16, 16, s=384), segments(384))


@pytest.mark.parametrize("length", [128, 640, 896, 2048, 4096])
def test_blocks_divide_the_sequence(length):
    blocks = splash._blocks(length)
    assert blocks.has_backward_blocks
    assert length % blocks.block_q == blocks.block_q % 128 == 0
    assert blocks.block_q == {128: 128, 640: 128, 896: 128}.get(length, 512)


def on(name):
    """The ambient mesh of another machine."""
    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=1, platform=name)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("change", "nvidia", "chosen"),
    [
        ({}, False, "splash"),
        ({"documents": False}, False, "splash"),
        ({"length": 200}, False, "xla"),
        ({"cache": True, "documents": False}, False, "xla"),
        ({"platform": "cpu"}, False, "xla"),
        ({"platform": "gpu"}, True, "xla"),  # documents
        ({"platform": "gpu", "documents": False}, True, "cudnn"),
        ({"platform": "gpu", "documents": False}, False, "xla"),
        ({"platform": "gpu", "documents": False, "key_size": 192}, True, "xla"),
        ({"platform": "gpu", "documents": False, "dtype": np.dtype("float32")}, True, "xla"),
    ],
)
def test_auto(monkeypatch, change, nvidia, chosen):
    monkeypatch.setattr(cudnn, "_is_nvidia", lambda: nvidia)
    assert choose("auto", TASK._replace(**change)) == chosen


def test_auto_asks_the_mesh_what_it_will_run_on():
    config = AttentionConfig(head_dim=64)
    for name, chosen in {"tpu": "splash", "cpu": "xla"}.items():
        with on(name):
            assert kernel_of(config, 2048, BF16) == chosen
            assert kernel_of(AttentionConfig("latent"), 2048, BF16) == chosen


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("flash", {}, r"'flash': must be one of \['auto', 'cudnn', 'splash', 'xla'\]"),
        (
            "splash",
            {"platform": "cpu"},
            r"'splash': runs on TPUs; must be 'auto' or 'xla' on a cpu",
        ),
        (
            "splash",
            {"length": 200},
            r"multiples of 128 .*sequences of 200 \(data.sequence_length\)",
        ),
        ("cudnn", {}, "'cudnn': runs on NVIDIA GPUs, not on this tpu"),
        ("cudnn", {"platform": "gpu"}, "computes single documents.*must be 'auto' or 'xla'"),
        (
            "cudnn",
            {"platform": "gpu", "documents": False, "dtype": "float32"},
            "bfloat16 or float16, not float32; see model.compute_dtype",
        ),
        (
            "cudnn",
            {"platform": "gpu", "documents": False, "key_size": 100},
            r"multiples of 8 up to 128, not 100 \(model.attention.head_dim, or the sizes",
        ),
        (
            "cudnn",
            {"platform": "gpu", "documents": False, "value_size": 192},
            r"multiples of 8 up to 128, not 192 ",
        ),
    ],
)
def test_refused(monkeypatch, name, change, message):
    monkeypatch.setattr(cudnn, "_is_nvidia", lambda: True)
    with pytest.raises(ValueError, match=rf"^model\.attention\.kernel=.*{message}") as error:
        choose(name, TASK._replace(**change))
    assert "\n" not in str(error.value)


def test_a_run_is_refused_before_it_writes_anything(tmp_path):
    config = tiny(**{"model.attention.kernel": "splash"})
    with pytest.raises(ValueError, match=r"kernel='splash': runs on TPUs; .* on a cpu"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_libtpu() is None, reason="libtpu is not installed; `make test` does it")
def test_a_tpus_program_has_no_scores():
    """On a mesh of two parts of the batch and two of the heads; nothing of a sequence is sent."""
    text = compiled_for_tpus("auto")
    assert "splash_mha_dkv" in text
    assert arrays_with_two(text, S_OF_PROGRAM) == []
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert arrays_with_two("f32[2,768,768]{2,1,0} bf16[4,768,64] s32[768,2,768]", 768) == [
        "[2,768,768]", "[768,2,768]"
    ]  # fmt: skip


def test_for_tpus_latent_attention_has_no_scores():
    """V2's heads, keys of 128 + 64 and values of 128: lowered without a TPU, not compiled."""
    attend = functools.partial(splash.attend, mask=CausalMask())
    key = jax.ShapeDtypeStruct((1, 384, 2, 192), BF16)
    value = jax.ShapeDtypeStruct((1, 384, 2, 128), BF16)

    def loss(*qkv):
        return attend(*qkv).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(key, key, value)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert all(f"splash_mha_{name}" in text for name in ("fwd", "dkv", "dq"))
    assert "384x384" not in text


def test_for_nvidia_the_program_calls_cudnn(monkeypatch):
    """Lowered without a GPU: what cuDNN computes is not tested here."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), BF16)

    def loss(*qkv):
        return KERNELS["cudnn"].attend(*qkv, CausalMask()).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape, shape, shape)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "256x256" not in text


def compiled_for_tpus(kernel):
    """The program of `tpu_program`, from a process of its own: here JAX is on another platform."""
    path = os.pathsep.join([str(find_libtpu()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.attention.tpu_program", kernel],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def arrays_with_two(text, length):
    """Shapes in a program that have a length twice."""
    shapes = set(re.findall(r"\[[\d,]+\]", text))
    return sorted(s for s in shapes if s[1:-1].split(",").count(str(length)) > 1)

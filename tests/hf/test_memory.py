"""Memory that a conversion holds: not the model, no more than it said before."""

import re
import subprocess
import sys

import pytest
import torch
import transformers

from dsmoe_jax.hf.files import Checkpoint
from tests.tools.patience import PATIENCE

SHARD_BYTES = 40 * 10**6

# In a process of its own: memory that was freed before, to use again, would hide what is held.
# Chunks and pieces are an eighth of what they are, as the model is far less than an eighth.
CONVERT = """
import sys
import jax, jax.numpy as jnp
from dsmoe_jax.hardware.host_memory import HeldMemory, return_freed_memory
from dsmoe_jax.hf import tensors, workdirs
from dsmoe_jax.runs import checkpoint

return_freed_memory()
for module in (checkpoint, workdirs):
    module.CHUNK_BYTES = 2 * 2**20
for module in (tensors, workdirs):
    module.PIECE_BYTES = 2**20
jnp.zeros(3).block_until_ready()  # the threads of XLA
model, workdir, back, shard_bytes = sys.argv[1:]
with HeldMemory() as held:
    workdirs.from_hf(model, workdir)
print(held.peak)
with HeldMemory() as held:
    workdirs.to_hf(workdir, back, None, "float32", int(shard_bytes))
print(held.peak)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Mixtral of 160 MB in files of 40."""
    config = transformers.MixtralConfig(
        vocab_size=4000, hidden_size=384, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=9, num_experts_per_tok=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("model")
    transformers.MixtralForCausalLM(config).save_pretrained(directory, max_shard_size=SHARD_BYTES)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for what a process holds")
def test_neither_the_model_nor_a_file(model, tmp_path):
    source = Checkpoint(model)
    assert source.bytes > 3.5 * source.largest_file
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(model), str(workdir), str(back), str(SHARD_BYTES)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = [int(line) for line in done.stdout.splitlines()]
    said = [float(mb) * 1e6 for mb in re.findall(r"up to ([\d.]+) MB in memory", done.stderr)]
    for bytes_held, bytes_said in zip(held, said, strict=True):
        assert bytes_held < bytes_said < source.bytes / 2
    assert held[1] < 1.2 * source.largest_file  # held[0] has what waits for the disk, too
    for name in ("model.norm.weight", "lm_head.weight"):
        everything = tuple(slice(0, size) for size in source.shapes[name])
        there, again = source.read(name, everything), Checkpoint(back).read(name, everything)
        assert torch.equal(torch.tensor(there), torch.tensor(again)), name

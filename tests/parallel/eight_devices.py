"""Run by test_meshes.py in a process with eight virtual devices: the same training on each mesh."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from dsmoe_jax.config import Config, replace
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.step import abstract_state, init_state, jit_train_step

B, S, V = 8, 32, 64
CONFIG = {
    "model.vocab_size": V,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.attention.num_attention_heads": 4,
    "model.attention.num_key_value_heads": 2,
    "model.attention.head_dim": 8,
    "model.first_k_dense_replace": 1,
    "model.intermediate_size": 32,
    "model.initializer_range": 0.1,
    "model.moe.n_routed_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.moe_intermediate_size": 16,
    "model.moe.expert_backend": "loop",
    "model.moe.balance.expert.factor": 0.1,
    "model.moe.balance.expert.scope": "global_batch",
    "model.moe.balance.router_z.factor": 0.01,
    "model.moe.router.bias_update_speed": 0.001,
    "model.moe.router.name": "topk",
    "data.sequence_length": S,
    "data.tokenizer_vocab_size": V,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 1e9,  # so that a gradient of a wrong scale shows
    "train.steps": 10,
    "train.global_batch_size": B,
}
MESHES = [
    {"fsdp": 8},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
]
# The last one's batch is computed in two micro-batches, in which nothing may show either: the load
# of the balance term and of the bias is that of the global batch.
MICRO_BATCHES = [1, 1, 2]


def config(**overrides: object) -> Config:
    """The tiny config with dotted keys changed."""
    return replace(Config(), **{**CONFIG, **overrides})


def on_mesh(sizes: dict[str, int]) -> Config:
    """The tiny config on a mesh."""
    micro_batches = MICRO_BATCHES[MESHES.index(sizes)] if sizes else 1
    axes = {f"mesh.{axis}": sizes.get(axis, 1) for axis in ("data", *sizes)}
    return config(**axes, **{"train.accumulation_steps": micro_batches})


def batch(step: int) -> dict[str, np.ndarray]:
    """Tokens by formula; every row has two documents, some end in padding."""
    index_BS = np.arange(B * S).reshape(B, S) + step
    tokens_BS = ((index_BS * index_BS * 31 + index_BS * 7) % V).astype(np.int32)
    valid_BS = np.arange(S) < np.array([[32, 32, 20, 32, 7, 32, 32, 29]]).T
    segments_BS = (np.where(np.arange(S) < 12, 1, 2) * valid_BS).astype(np.int32)
    return {
        "tokens_BS": tokens_BS,
        "targets_BS": np.roll(tokens_BS, -1, axis=1),
        "segment_ids_BS": segments_BS,
        "positions_BS": np.tile(np.arange(S, dtype=np.int32) % 12, (B, 1)),
        "loss_mask_BS": valid_BS.astype(np.float32),
    }


def leaves(tree: object) -> dict[str, jax.Array]:
    """Arrays by path, but for what is meant to depend on the mesh: rows between devices."""
    arrays = {jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(tree)}
    return {key: x for key, x in arrays.items() if ".exchange." not in key}


class OnMesh:
    """The tiny run on a mesh of all devices; without sizes, on one device: the reference."""

    def __init__(self, sizes: dict[str, int]):
        self.config = on_mesh(sizes)
        self.mesh = open_mesh(self.config, jax.devices()[: 8 if sizes else 1])
        with jax.set_mesh(self.mesh):
            self.rows = sharding.local_rows(B)
            self.step = jit_train_step(self.config, np.ones(V, np.int32))
            self.state = init_state(self.config)

    def train(self, steps: int) -> tuple[dict[str, jax.Array], list[float]]:
        """Goes on for some steps; arrays of the state and of the last metrics, and all losses."""
        losses, metrics = [], None
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                x = sharding.global_batch(batch(int(self.state.step)), self.rows, B)
                self.state, metrics = self.step(self.state, x)
                losses.append(float(metrics.loss))
        return leaves({"state": self.state, "metrics": metrics}), losses

    def save(self, directory: Path) -> None:
        """Writes a checkpoint."""
        checkpoints = Checkpoints(directory, keep=1)
        with jax.set_mesh(self.mesh):
            checkpoints.save(int(self.state.step), self.state, {})
        checkpoints.close()

    def load(self, directory: Path) -> None:
        """Goes on from a checkpoint, whatever mesh it was saved on."""
        checkpoints = Checkpoints(directory, keep=None)
        with jax.set_mesh(self.mesh):
            (step,) = checkpoints.steps()
            self.state = checkpoints.restore(abstract_state(self.config), step).state
        checkpoints.close()


def compare(found: dict[str, jax.Array], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative error of each array."""
    assert found.keys() == wanted.keys()
    errors = {}
    for key, y in wanted.items():
        x, y = np.asarray(found[key], np.float64), np.asarray(y, np.float64)
        errors[key] = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    return errors


def main(directory: Path) -> list[dict[str, object]]:
    """Every mesh against one device; then each goes on from the checkpoint of the one before."""
    reference = OnMesh({})
    wanted = {key: np.asarray(x) for key, x in reference.train(1)[0].items()}
    reference.save(directory / "0")
    after, losses = reference.train(20)
    after = {key: np.asarray(x) for key, x in after.items()}
    results = []
    for i, sizes in enumerate([*MESHES, {}]):
        run = OnMesh(sizes) if sizes else reference
        errors, shardings = {}, {}
        if sizes:
            found, _ = run.train(1)
            errors = compare(found, wanted)
            shardings = {
                key: {"spec": str(x.sharding.spec), "shard": x.sharding.shard_shape(x.shape)}
                for key, x in found.items()
            }
            run.save(directory / f"{i + 1}")
        run.load(directory / f"{i}")
        resumed, resumed_losses = run.train(20)
        results.append({
            "sizes": sizes, "errors": errors, "shardings": shardings, "losses": losses,
            "resumed_losses": resumed_losses, "resumed_errors": compare(resumed, after),
        })  # fmt: skip
    return results


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "results.json").write_text(json.dumps(main(out)))

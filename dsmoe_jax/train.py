"""Trains a model, or goes on with a run that was interrupted: the same command does both.

python -m dsmoe_jax.train --config=configs/dsmoe_2b.py:demo --workdir=runs/dsmoe
python -m dsmoe_jax.train --config=configs/dsmoe_2b.py:demo --workdir=runs/wide \\
    --config.model.moe.n_shared_experts=2

The workdir then holds config.json, metrics.jsonl (one row a logged step), checkpoints/,
tensorboard/ and, when the run is finished, evaluation.json.  SIGTERM and Ctrl-C save first.
"""

from __future__ import annotations

from absl import flags

from dsmoe_jax import cli
from dsmoe_jax.host_memory import keep_freed_memory
from dsmoe_jax.training.loop import train

cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing.")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    keep_freed_memory()
    result = train(cli.config(), _WORKDIR.value)
    held_out = result.evaluation
    print(
        f"step {result.step}: held-out loss {held_out['loss']:.4f} nats per token,"
        f" {held_out['bits_per_byte']:.4f} bits per byte"
    )


if __name__ == "__main__":
    cli.run(main)

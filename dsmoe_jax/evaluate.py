"""Measures a trained run on held-out text: nats per token and bits per byte, by domain.

python -m dsmoe_jax.evaluate --workdir=runs/dsmoe
python -m dsmoe_jax.evaluate --workdir=runs/dsmoe --step=200 --max_batches=10 --json
"""

from __future__ import annotations

import json
from typing import Any

import jax
from absl import flags
from flax import nnx

from dsmoe_jax import cli
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.training.progress import ProgressLine
from dsmoe_jax.training.run import load_run

cli.define_mesh()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at once.", lower_bound=1)
_MAX_BATCHES = flags.DEFINE_integer("max_batches", 0, "Stop early; 0 is all.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    with jax.set_mesh(cli.mesh()):
        run = load_run(_WORKDIR.value, _STEP.value)
        graph, params, other = nnx.split(run.model, nnx.Param, ...)
        held_out = HeldOut(graph, run.corpus, _BATCH_SIZE.value, _MAX_BATCHES.value)
        line = ProgressLine(run.config.name, held_out.n_batches)
        result = {"step": run.step} | held_out.measure(params, other, line.update)
    line.close()
    print(json.dumps(result) if _JSON.value else table(result))


def table(result: dict[str, Any]) -> str:
    """One line a domain, the whole last."""
    width = max(len(name) for name in (*result["domains"], "all"))
    lines = [f"{'domain':{width}}  {'tokens':>10}  nats/token  bits/byte"]
    for name, row in [*result["domains"].items(), ("all", result)]:
        numbers = f"{row['tokens']:>10,}  {row['loss']:10.4f}  {row['bits_per_byte']:9.4f}"
        lines.append(f"{name:{width}}  {numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)

"""Compiles the train step of a config for a TPU slice, without a TPU.

Prints memory, traffic of the chip's memory by scope of the model, traffic between chips, and bounds
of the time of a step.  Takes some minutes for a model of any size.

python -m dsmoe_jax aot --config=configs/dsmoe_16b.py --topology=v5p:4x4x4
python -m dsmoe_jax aot --config=configs/dsmoe_2b.py --topology=v5e:4x4 --json \\
    --config.mesh.data=2 --config.mesh.fsdp=8 --config.train.accumulation_steps=32

Several such slices, with the data-centre network between them: --config.mesh.slices=2.

The mesh is that of the config; if the config has none, the command `plan` proposes it.  Of a run in
stages it is the step with the most FLOPs.  Needs pip install 'dsmoe_jax[tpu]'.  A step that does
not fit is an error that gives the numbers.
"""

from __future__ import annotations

import json
from typing import Any

import jax
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import memory_traffic
from dsmoe_jax.planning.ahead_of_time import Proof, parts_of_step, prove
from dsmoe_jax.planning.plan_report import stage_to_plan

command_line.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice: v4, v5e, v5p or v6e, colon, shape.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")


def describe(proof: Proof) -> str:
    """The proof as text."""
    chip = CHIPS[proof.chip]
    roof = proof.roofline
    shape = " x ".join(f"{axis} {n}" for axis, n in proof.sizes.items() if n > 1) or "one chip"
    by = "chosen by the planner" if proof.planned else "from the config"
    slow, fast = roof.mfu
    lines = [
        f"{proof.config.name} ({proof.config.scale}) on {proof.topology}, {proof.chips} chips",
        f"mesh      {shape}, {proof.config.train.accumulation_steps} micro-batches; {by}",
        f"memory    {proof.used:.2f} of {chip.hbm_gb} GB a chip: {_listing(proof.memory)};"
        f" all gradients in float32 would be {proof.gradients:.2f}",
        f"FLOPs     {proof.flops:.4g} a step (forward and backward, nothing recomputed)",
        f"received  {sum(proof.collectives.values()):.2f} GB a chip and step:"
        f" {_listing(proof.collectives) or 'nothing'}",
        f"overlap   {_overlap(proof)}",
        f"traffic   {sum(proof.traffic.values()):.0f} GB of HBM a chip and step"
        f"{_counted_once(proof)}, by scope:",
        *_traffic_table(proof),
        f"at least  compute {roof.compute:.3g} s, memory {roof.memory:.3g} s, network"
        f" {roof.network:.3g} s a step",
        f"estimate  {roof.overlapped:.3g} s (all of them at once, MFU {fast:.0%}) to"
        f" {roof.serial:.3g} s (the chip waits for the network, MFU {slow:.0%})",
        f"assumed   {chip.peak_flops / 1e12:.0f} TFLOP/s, HBM {chip.hbm_bandwidth / 1e9:.0f} GB/s,"
        f" links {chip.link_bandwidth / 1e9:.0f} GB/s a chip, each fully used; ragged exchanges as"
        " large as they can be; experts compute no padding, but move it",
        f"compiled  in {proof.seconds:.0f} s",
    ]
    return "\n".join(lines)


def _overlap(proof: Proof) -> str:
    o = proof.overlap
    if not o.exchanges:
        return "no exchange of tokens in the program"
    return (
        f"of {o.exchanges} exchanges in the program {o.asynchronous} have a start and an end,"
        f" {o.with_compute} of them with computation in between,"
        f" {o.with_shared_experts} with the shared experts'"
    )


def _counted_once(proof: Proof) -> str:
    once = sum(m.total for m in proof.moves if m.counted_once) / 1e9
    if not once:
        return ""
    return f" ({once:.2g} GB in loops that run as often as the data want, counted once)"


def _traffic_table(proof: Proof) -> list[str]:
    """Lines of GB by scope: a step, and its parts."""
    parts = parts_of_step(proof.config, proof.moves)
    columns = {
        "a step": proof.traffic,
        "layer x micro-batch": parts["layer"],
        "rest of micro-batch": parts["micro-batch"],
        "rest of step": parts["step"],
    }
    lines = [" " * 10 + f"{'':14}" + "".join(f"{name:>20}" for name in columns)]
    for scope in memory_traffic.ALL_SCOPES:
        numbers = "".join(f"{column[scope]:20.2f}" for column in columns.values())
        lines.append(" " * 10 + f"{scope:14}{numbers}")
    return lines


def _listing(costs: dict[str, float]) -> str:
    return ", ".join(f"{name} {gb:.2f}" for name, gb in costs.items())


def as_json(proof: Proof) -> dict[str, Any]:
    """The proof as JSON: GB, seconds, FLOPs."""
    roof = proof.roofline
    return {
        "name": proof.config.name,
        "scale": proof.config.scale,
        "topology": proof.topology,
        "chips": proof.chips,
        "mesh": {axis: proof.sizes[axis] for axis in AXES},
        "planned": proof.planned,
        "accumulation_steps": proof.config.train.accumulation_steps,
        "hbm_gb": CHIPS[proof.chip].hbm_gb,
        "used_gb": proof.used,
        "memory_gb": proof.memory,
        "gradients_gb": proof.gradients,
        "flops": proof.flops,
        "collectives_gb": proof.collectives,
        "traffic_gb": sum(proof.traffic.values()),
        "traffic_gb_by_scope": proof.traffic,
        "traffic_gb_counted_once": sum(m.total for m in proof.moves if m.counted_once) / 1e9,
        "traffic_gb_of_parts": parts_of_step(proof.config, proof.moves),
        "overlap": proof.overlap._asdict(),
        "roofline": {
            "compute_s": roof.compute,
            "memory_s": roof.memory,
            "network_s": roof.network,
            "step_s": [roof.overlapped, roof.serial],
            "mfu": list(roof.mfu),
        },
        "mfu": list(roof.mfu),
        "compile_s": proof.seconds,
    }


def main() -> None:
    """Runs the command."""
    if not _TOPOLOGY.value:
        raise ValueError("--topology: missing; for example --topology=v5p:4x4x4")
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for TPUs in this machine
    config, note = stage_to_plan(command_line.config())
    proof = prove(config, _TOPOLOGY.value)
    print(json.dumps(as_json(proof)) if _JSON.value else note + describe(proof))

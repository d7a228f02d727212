"""Models of the paper in pipeline stages on TPU slices, beside the same chips without: compiled.

    python -m benchmarks.pipelines               # what benchmarks/results/pipelines.jsonl lacks
    python -m benchmarks.pipelines --only=16b    # the same for one model
    python -m benchmarks.pipelines --table       # print the table of what is there

Each case is one `python -m dsmoe_jax aot --json` at the paper's sizes and global batch.  Needs
pip install 'dsmoe_jax[tpu]', and no TPU.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

import configs
from benchmarks import harness
from benchmarks.slices import key, prove
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.model import pipelined
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.planning import planner
from dsmoe_jax.planning.collectives import BETWEEN_SLICES
from dsmoe_jax.training.start import state_shapes

RESULTS = Path(__file__).parent / "results" / "pipelines.jsonl"

# 62 layers of 145B leave 61 behind the dense one, a prime number: here it has 60 in stages.
DIVISIBLE = {"model.num_hidden_layers": 61}

# (config, slice, changes of the config).
CASES: list[tuple[str, str, dict[str, int]]] = [
    (
        *("dsmoe_16b", "v5p:2x2x3"),
        {"mesh.stage": 3, "mesh.fsdp": 4, "train.accumulation_steps": 576}
        | {"train.pipeline_micro_batches": 36},
    ),
    ("dsmoe_16b", "v5p:2x2x3", {"mesh.data": 3, "mesh.fsdp": 4, "train.accumulation_steps": 192}),
    (
        *("dsmoe_145b", "v5p:4x8x8"),
        {"mesh.stage": 4, "mesh.fsdp": 16, "mesh.expert": 4, "train.accumulation_steps": 72}
        | {"train.pipeline_micro_batches": 36, **DIVISIBLE},
    ),
    (
        *("dsmoe_145b", "v5p:4x8x8"),
        {"mesh.fsdp": 64, "mesh.expert": 4, "train.accumulation_steps": 9, **DIVISIBLE},
    ),
]


def flags(changes: dict[str, int]) -> list[str]:
    """The flags of `aot` for the changes of a case; axes that it does not name are 1."""
    return [f"--config.{name}={value}" for name, value in ({"mesh.data": 1} | changes).items()]


def changed(report: dict) -> Config:
    """The config of a report."""
    pairs = (flag.removeprefix("--config.").split("=") for flag in report["flags"])
    config = from_config_dict(configs.load(report["config"]))
    return replace(config, **{name: int(value) for name, value in pairs})


def row(report: dict) -> dict[str, str]:
    """A report as a row of the table."""
    if "error" in report:
        return {"model": report["config"], "slice": report["topology"], "mesh": report["error"]}
    config = changed(report)
    stages = config.mesh.stage
    schedule = Schedule(pipelined.together(config.train), config.train.pipeline_repeats)
    plan = planner.estimate(
        config,
        state_shapes(config),
        report["mesh"],
        report["accumulation_steps"],
        schedule=schedule if stages > 1 else None,
    )
    received = report["collectives_gb"]
    slow, fast = report["mfu"]
    fastest, slowest = report["roofline"]["step_s"]
    slices = f"{config.mesh.slices} slices of " if config.mesh.slices > 1 else ""
    return {
        "model": report["config"],
        "slice": f"{slices}{report['topology']} ({report['chips']} chips)",
        "mesh": planner.shape(report["mesh"]),
        "micro-batches": str(report["accumulation_steps"]),
        "that pass together": str(schedule.micro_batches) if stages > 1 else "-",
        "bubble": f"{schedule.bubble(stages):.1%}" if stages > 1 else "-",
        "memory, GB": f"{report['used_gb']:.1f} of {report['hbm_gb']}",
        "planner said, GB": f"{plan.used:.1f} ({plan.used / report['used_gb'] - 1:+.0%})",
        "HBM traffic, TB": f"{report['traffic_gb'] / 1e3:.1f}",
        "received, GB": f"{sum(received.values()):.0f}",
        "from other stages, GB": f"{received.get('collective-permute', 0):.0f}",
        "from other slices, GB": f"{received.get(BETWEEN_SLICES, 0):.1f}",
        "step, s": f"{fastest:.1f} to {slowest:.1f}",
        "MFU": f"{slow:.0%} to {fast:.0%}",
        "compiled, s": f"{report['compile_s']:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose config, slice or flags have this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for TPUs in this machine
    text = RESULTS.read_text() if RESULTS.exists() else ""
    reports = {key(r): r for r in map(json.loads, text.splitlines())}
    cases = {(c, on, " ".join(flags(changes))): flags(changes) for c, on, changes in CASES}
    todo = [c for c in cases if args.only in " ".join(c) and c not in reports]
    for config, topology, name in [] if args.table else todo:
        print(f"{config} on {topology}: {name}", file=sys.stderr, flush=True)
        report = prove(config, topology, cases[config, topology, name])
        with RESULTS.open("a") as file:
            file.write(json.dumps(report) + "\n")
        reports[key(report)] = report
    print(harness.table([row(reports[c]) for c in cases if c in reports]))


if __name__ == "__main__":
    main()

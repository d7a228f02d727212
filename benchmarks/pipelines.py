"""Models of the paper in pipeline stages on TPU slices, beside the same chips without: compiled.

    python -m benchmarks.pipelines               # what benchmarks/results/pipelines.jsonl lacks
    python -m benchmarks.pipelines --only=16b    # the same for one model
    python -m benchmarks.pipelines --table       # print the table of what is there
    python -m benchmarks.pipelines --plan        # what the planner says of more of them

Each case is one `python -m dsmoe_jax aot --json` at the paper's sizes and global batch.  Needs
pip install 'dsmoe_jax[tpu]', and no TPU; the planner needs neither.
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

# (config, number of v5p, changes of the config): in pairs, with stages and without.
PLANNED: list[tuple[str, int, dict[str, int]]] = [
    (
        *("dsmoe_16b", 12),
        {"mesh.stage": 3, "mesh.fsdp": 4, "train.accumulation_steps": 576}
        | {"train.pipeline_micro_batches": 36},
    ),
    ("dsmoe_16b", 12, {"mesh.data": 3, "mesh.fsdp": 4, "train.accumulation_steps": 192}),
    (
        *("dsmoe_145b", 256),
        {"mesh.stage": 4, "mesh.fsdp": 16, "mesh.expert": 4, "train.accumulation_steps": 72}
        | {"train.pipeline_micro_batches": 36, **DIVISIBLE},
    ),
    (
        *("dsmoe_145b", 256),
        {"mesh.fsdp": 64, "mesh.expert": 4, "train.accumulation_steps": 9, **DIVISIBLE},
    ),
    (
        *("dsmoe_16b", 192),
        {"mesh.slices": 3, "mesh.stage": 3, "mesh.fsdp": 64, "train.accumulation_steps": 36},
    ),
    (
        *("dsmoe_16b", 192),
        {"mesh.slices": 3, "mesh.stage": 3, "mesh.fsdp": 64, "train.accumulation_steps": 36}
        | {"train.pipeline_repeats": 9},
    ),
    (
        *("dsmoe_16b", 192),
        {"mesh.slices": 3, "mesh.data": 3, "mesh.fsdp": 64, "train.accumulation_steps": 12},
    ),
    (
        *("dsmoe_145b", 512),
        {"mesh.slices": 4, "mesh.stage": 4, "mesh.fsdp": 32, "mesh.expert": 4}
        | {"train.accumulation_steps": 36, **DIVISIBLE},
    ),
    (
        *("dsmoe_145b", 512),
        {"mesh.slices": 4, "mesh.data": 4, "mesh.fsdp": 32, "mesh.expert": 4}
        | {"train.accumulation_steps": 9, **DIVISIBLE},
    ),
]


def flags(changes: dict[str, int]) -> list[str]:
    """The flags of `aot` for the changes of a case; axes that it does not name are 1."""
    return [f"--config.{name}={value}" for name, value in ({"mesh.data": 1} | changes).items()]


def load(name: str, changes: dict[str, int]) -> Config:
    """The config of a case."""
    return replace(from_config_dict(configs.load(name)), **({"mesh.data": 1} | changes))


def changed(report: dict) -> Config:
    """The config of a report."""
    pairs = (flag.removeprefix("--config.").split("=") for flag in report["flags"])
    return load(report["config"], {name: int(value) for name, value in pairs})


def estimate(config: Config, sizes: dict[str, int]) -> planner.Plan:
    """A case by the planner's arithmetic, whether it fits or not."""
    schedule = None
    if config.mesh.stage > 1:
        schedule = Schedule(pipelined.together(config.train), config.train.pipeline_repeats)
    n = config.train.accumulation_steps
    return planner.estimate(config, state_shapes(config), sizes, n, schedule=schedule)


def course(config: Config, plan: planner.Plan) -> dict[str, str]:
    """The columns of a row that say how the batch is cut."""
    passing = "-" if plan.schedule is None else str(plan.schedule.micro_batches)
    repeats = config.train.pipeline_repeats
    return {
        "micro-batches": str(plan.accumulation_steps),
        "that pass together": passing if repeats == 1 else f"{passing}, {repeats} repeats",
        "bubble": "-" if plan.schedule is None else f"{plan.idle:.1%}",
    }


def planned_row(name: str, chips: int, changes: dict[str, int]) -> dict[str, str]:
    """A row of a table: a case by the planner."""
    config = load(name, changes)
    plan = estimate(config, config.mesh.sizes(chips))
    bounds = plan.bounds(config, "v5p")
    slow, fast = bounds.mfu
    memory = plan.memory
    state = sum(memory[part] for part in ("parameters", "moments", "gradients"))
    kept = memory["activations kept"] + memory.get("waiting micro-batches", 0.0)
    return {
        "model": name,
        "v5p": f"{chips} in {plan.slices} slices" if plan.slices > 1 else str(chips),
        "mesh": planner.shape(plan.sizes),
        **course(config, plan),
        "memory, GB": f"{plan.used:.1f}",
        "state and gradients, GB": f"{state:.1f}",
        "activations kept and waiting, GB": f"{kept:.1f}",
        "weights received, GB": f"{plan.traffic.get('weights', 0.0):.0f}",
        "from other slices, GB": f"{sum(plan.sliced.values()):.1f}" if plan.slices > 1 else "-",
        "step, s": f"{bounds.overlapped:.1f} to {bounds.serial:.1f}",
        "MFU": f"{slow:.0%} to {fast:.0%}",
    }


def row(report: dict) -> dict[str, str]:
    """A report as a row of the table."""
    if "error" in report:
        return {"model": report["config"], "slice": report["topology"], "mesh": report["error"]}
    config = changed(report)
    plan = estimate(config, report["mesh"])
    received = report["collectives_gb"]
    slow, fast = report["mfu"]
    fastest, slowest = report["roofline"]["step_s"]
    slices = f"{config.mesh.slices} slices of " if config.mesh.slices > 1 else ""
    return {
        "model": report["config"],
        "slice": f"{slices}{report['topology']} ({report['chips']} chips)",
        "mesh": planner.shape(report["mesh"]),
        **course(config, plan),
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
    parser.add_argument("--plan", action="store_true", help="ask the planner, compile nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for TPUs in this machine
    if args.plan:
        print(harness.table([planned_row(*case) for case in PLANNED]))
        return
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
    if rows := [row(reports[c]) for c in cases if c in reports]:
        print(harness.table(rows))
    else:
        print(f"nothing in {RESULTS}")


if __name__ == "__main__":
    main()

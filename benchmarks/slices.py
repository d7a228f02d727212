"""The models of the paper on the TPU slices that would train them: compiled, not run.

    python -m benchmarks.slices                     # what benchmarks/results/slices.jsonl lacks
    python -m benchmarks.slices --only=dsmoe_16b    # the same for one model
    python -m benchmarks.slices --table             # print the tables of what is there

Each case is one `python -m dsmoe_jax aot --json` at the paper's sizes and global batch, on the
mesh that the planner proposes (or the one given below).  A line without traffic of HBM is an older
one, and compiled again.  Needs pip install 'dsmoe_jax[tpu]'.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax

import configs
from benchmarks import harness
from dsmoe_jax.config import from_config_dict
from dsmoe_jax.planning import planner
from dsmoe_jax.training.start import state_shapes

RESULTS = Path(__file__).parent / "results" / "slices.jsonl"

# (config, slice, mesh, micro-batches); no mesh: the planner's.
CASES: list[tuple[str, str, dict[str, int], int]] = [
    ("dsmoe_2b", "v5e:4x4", {}, 0),
    ("dsmoe_16b", "v5p:4x4x4", {"fsdp": 8, "expert": 8}, 36),
    ("dsmoe_16b", "v6e:8x8", {"fsdp": 8, "expert": 8}, 36),
    ("dsmoe_145b", "v5p:4x8x8", {"fsdp": 16, "expert": 16}, 9),
    ("dsmoe_145b", "v5p:8x8x8", {"fsdp": 32, "expert": 16}, 9),
    ("gshard_137b", "v5p:4x8x8", {"fsdp": 16, "expert": 16}, 9),
    ("gshard_137b", "v5p:8x8x8", {"fsdp": 32, "expert": 16}, 9),
    ("deepseek_v2_lite", "v5p:4x4x4", {"fsdp": 8, "expert": 8}, 36),
    ("deepseek_v3", "v5p:8x8x8", {"fsdp": 32, "expert": 16}, 30),
]
COLUMNS: tuple[str, ...] = (
    "model", "slice", "mesh", "micro-batches", "memory, GB", "state, GB", "temporaries, GB",
    "planner said, GB", "HBM traffic, TB", "planner said, TB", "received, GB", "ragged at most, GB",
    "exchanges with a start and an end /"
    " beside computation / beside shared experts", "step, s", "MFU", "compiled, s",
)  # fmt: skip


def mesh_flags(sizes: dict[str, int], micro_batches: int) -> list[str]:
    """The flags of a mesh that is not the planner's."""
    if not sizes:
        return []
    flags = [f"--config.mesh.{axis}={n}" for axis, n in ({"data": 1} | sizes).items()]
    return [*flags, f"--config.train.accumulation_steps={micro_batches}"]


def prove(config: str, topology: str, flags: list[str]) -> dict:
    """The report of one case; under "error" the sentence of one that is refused."""
    command = [
        sys.executable, "-m", "dsmoe_jax", "aot", f"--config=configs/{config}.py",
        f"--topology={topology}", "--json", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    case = {"config": config, "topology": topology, "flags": flags}
    if done.returncode:
        return case | {"error": done.stderr.strip().splitlines()[-1]}
    return case | json.loads(done.stdout.splitlines()[-1])


def planned(report: dict) -> planner.Plan:
    """The compiled step by the planner's arithmetic."""
    config = from_config_dict(configs.load(report["config"]))
    state = state_shapes(config)
    return planner.estimate(config, state, report["mesh"], report["accumulation_steps"])


def row(report: dict) -> dict[str, str]:
    """A report as a row of the table."""
    r = report
    if "error" in r:
        found = (r["config"], r["topology"], r["error"])
        return dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, found, strict=False))
    memory = r["memory_gb"]
    roof = r["roofline"]
    overlap = r["overlap"]
    plan = planned(r)
    is_old = "traffic_gb" not in r  # its bounds were made from weights and state alone
    bounds = ("-", "-", "-", "-")
    memory_said = "-"  # the planner's arithmetic is of today's program
    if not is_old:
        memory_said = f"{plan.used:.1f} ({plan.used / r['used_gb'] - 1:+.0%})"
        slow, fast = r["mfu"]
        said = sum(plan.hbm.values())
        bounds = (
            f"{r['traffic_gb'] / 1e3:.1f}",
            f"{said / 1e3:.1f} ({said / r['traffic_gb'] - 1:+.0%})",
            f"{roof['step_s'][0]:.2f} to {roof['step_s'][1]:.2f}",
            f"{slow:.0%} to {fast:.0%}",
        )
    found = (
        r["config"],
        f"{r['topology']} ({r['chips']} chips)",
        " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1),
        str(r["accumulation_steps"]),
        f"{r['used_gb']:.1f} of {r['hbm_gb']}",
        f"{memory['parameters'] + memory['moments']:.1f}",
        f"{memory['gradients and temporaries']:.1f}",
        memory_said,
        *bounds[:2],
        f"{sum(r['collectives_gb'].values()):.0f}",
        f"{r['collectives_gb'].get('ragged-all-to-all', 0):.0f}",
        f"{overlap['asynchronous']} / {overlap['with_compute']} / {overlap['with_shared_experts']}"
        f" of {overlap['exchanges']}",
        *bounds[2:],
        f"{r['compile_s']:.0f}",
    )
    return dict(zip(COLUMNS, found, strict=True))


def scope_row(report: dict, part: str) -> dict[str, str]:
    """GB of HBM traffic of a part of a step by scope, as a row of a table."""
    by_scope = report["traffic_gb_of_parts"][part]
    return {
        "model": report["config"],
        "slice": report["topology"],
        "all": f"{sum(by_scope.values()):.1f}",
        **{scope: f"{gb:.1f}" for scope, gb in by_scope.items()},
    }


PARTS = {
    "layer": "one micro-batch in one MoE layer",
    "micro-batch": "one micro-batch outside of the MoE layers",
    "step": "the rest of a step",
}


def print_tables(reports: list[dict]) -> None:
    """The table of all cases, and one of HBM traffic for each part of a step."""
    order = [case[:2] for case in CASES]
    reports = sorted(reports, key=lambda r: order.index((r["config"], r["topology"])))
    print(harness.table([row(r) for r in reports]))
    for part, meaning in PARTS.items():
        rows = [scope_row(r, part) for r in reports if "traffic_gb_of_parts" in r]
        if rows:
            print(f"\nHBM traffic of {meaning}, GB:\n\n{harness.table(rows)}")


def key(report: dict) -> tuple[str, str, str]:
    """The case of a report."""
    return report["config"], report["topology"], " ".join(report["flags"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose config or slice contains this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for TPUs in this machine
    text = RESULTS.read_text() if RESULTS.exists() else ""
    reports = {key(r): r for r in map(json.loads, text.splitlines())}
    done = {case for case, r in reports.items() if "traffic_gb" in r or "error" in r}
    cases = [(config, on, mesh_flags(sizes, n)) for config, on, sizes, n in CASES]
    todo = [
        c for c in cases if args.only in f"{c[0]} {c[1]}" and (*c[:2], " ".join(c[2])) not in done
    ]
    for n, (config, topology, flags) in enumerate([] if args.table else todo, 1):
        print(f"{n}/{len(todo)}: {config} on {topology}", file=sys.stderr, flush=True)
        report = prove(config, topology, flags)
        reports[key(report)] = report
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in reports.values()))
    if reports:
        print_tables(list(reports.values()))
    else:
        print(f"nothing in {RESULTS}")


if __name__ == "__main__":
    main()

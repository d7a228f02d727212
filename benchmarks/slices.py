"""The models of the paper on the TPU slices that would train them: compiled, not run.

    python -m benchmarks.slices                     # what benchmarks/results/slices.jsonl lacks
    python -m benchmarks.slices --only=dsmoe_16b    # the same for one model
    python -m benchmarks.slices --table             # print the table of what is there

Each case is one `python -m dsmoe_jax.aot --json` at the paper's sizes and global batch, on the
mesh that the planner proposes (or the one given below).  Needs pip install 'dsmoe_jax[tpu]'.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import harness

RESULTS = Path(__file__).parent / "results" / "slices.jsonl"

# (config, slice, further flags)
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("dsmoe_2b", "v5e:4x4", ()),
    ("dsmoe_16b", "v5p:4x4x4", ()),
    ("dsmoe_16b", "v6e:8x8", ()),
    ("dsmoe_145b", "v5p:4x8x8", ()),
    ("dsmoe_145b", "v5p:8x8x8", ()),
    ("gshard_137b", "v5p:4x8x8", ()),
    ("gshard_137b", "v5p:8x8x8", ()),
]
COLUMNS = (
    "model", "slice", "mesh", "micro-batches", "memory, GB", "state, GB", "temporaries, GB",
    "FLOPs a step", "received, GB", "of which ragged", "step, s", "MFU", "compiled, s",
)  # fmt: skip


def prove(config: str, topology: str, flags: tuple[str, ...]) -> dict:
    """The report of one case; under "error" the sentence of one that is refused."""
    command = [
        sys.executable, "-m", "dsmoe_jax.aot", f"--config=configs/{config}.py",
        f"--topology={topology}", "--json", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    case = {"config": config, "topology": topology, "flags": list(flags)}
    if done.returncode:
        return case | {"error": done.stderr.strip().splitlines()[-1]}
    return case | json.loads(done.stdout.splitlines()[-1])


def row(report: dict) -> dict[str, str]:
    """A report as a row of the table."""
    r = report
    if "error" in r:
        found = (r["config"], r["topology"], r["error"])
        return dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, found, strict=False))
    memory, roof = r["memory_gb"], r["roofline"]
    slow, fast = roof["mfu"]
    found = (
        r["config"],
        f"{r['topology']} ({r['chips']} chips)",
        " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1),
        str(r["accumulation_steps"]),
        f"{r['used_gb']:.1f} of {r['hbm_gb']}",
        f"{memory['parameters'] + memory['moments']:.1f}",
        f"{memory['gradients and temporaries']:.1f}",
        f"{r['flops']:.3g}",
        f"{sum(r['collectives_gb'].values()):.0f}",
        f"{r['collectives_gb'].get('ragged-all-to-all', 0):.0f}",
        f"{roof['step_s'][0]:.2f} to {roof['step_s'][1]:.2f}",
        f"{slow:.0%} to {fast:.0%}",
        f"{r['compile_s']:.0f}",
    )
    return dict(zip(COLUMNS, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose config contains this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    text = RESULTS.read_text() if RESULTS.exists() else ""
    reports = [json.loads(line) for line in text.splitlines()]
    done = {(r["config"], r["topology"], *r["flags"]) for r in reports}
    todo = [c for c in CASES if args.only in c[0] and (c[0], c[1], *c[2]) not in done]
    for n, (config, topology, flags) in enumerate([] if args.table else todo, 1):
        print(f"{n}/{len(todo)}: {config} on {topology}", file=sys.stderr, flush=True)
        reports.append(prove(config, topology, flags))
        RESULTS.open("a").write(json.dumps(reports[-1]) + "\n")
    print(harness.table([row(r) for r in reports]) if reports else f"nothing in {RESULTS}")


if __name__ == "__main__":
    main()

"""Time of a training step by granularity, over that at m = 4.

    python -m benchmarks.granularity --scale=demo
    python -m benchmarks.granularity --scale=demo --json=benchmarks/results/NAME.json

The models of experiments/laws/granularity.py train on their own text, interleaved in one process:
in each round every model makes so many steps, and `ratio` is the median over rounds of (its time /
that of m = 4 in the same round).  The last line is the literal `STEP_TIMES` of
experiments/laws/granularity_time.py.  The first rounds do not count: in them the routers leave the
uniform choice with which they begin.  Validation, checkpoints and compilation are not timed.
"""

import statistics
import sys
from typing import Any

import jax

from benchmarks import harness
from benchmarks.train_step import STEPS, WARM_UP, Training
from configs.base import SCALES
from dsmoe_jax.config import replace
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.training.devices import open_mesh
from experiments.laws import granularity

UNIT = 4  # the m whose time is 1


def rows_of(seconds: dict[int, list[float]]) -> list[dict[str, Any]]:
    """A row of results for each m."""
    return [
        {
            "m": m,
            "ms a step": 1e3 * statistics.median(times) / STEPS,
            "ratio": harness.ratio(times, seconds[UNIT]),
            "rounds": len(times),
        }
        for m, times in seconds.items()
    ]


def literal(rows: list[dict[str, Any]]) -> str:
    """The ratios as the experiment's literal."""
    return "STEP_TIMES = {" + ", ".join(f"{row['m']}: {row['ratio']:.2f}" for row in rows) + "}"


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    parser = harness.flag_parser("benchmarks.granularity", __doc__, repeats=21)
    parser.add_argument("--scale", default="demo", choices=SCALES)
    parser.add_argument("--corpus", help="for the scales that have none of their own")
    flags = parser.parse_args(argv)
    changes = {} if flags.corpus is None else {"data.corpus": flags.corpus}
    configs = {
        m: replace(granularity.split(m).run_config(flags.scale, 0), **changes)
        for m in granularity.SPLITS
    }
    with jax.set_mesh(open_mesh(configs[UNIT])):
        runs = {}
        for m, config in configs.items():
            print(f"preparing m = {m}", file=sys.stderr)
            runs[m] = Training(config)
        rows = rows_of(harness.interleaved(runs, flags.repeats, WARM_UP))
    report = {
        **harness.device_header(),
        "freed_memory_kept": kept,
        "scale": flags.scale,
        "repeats": flags.repeats,
        "steps_a_round": STEPS,
        "rows": rows,
    }
    print(harness.table(rows))
    print(literal(rows))
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()

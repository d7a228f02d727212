"""Cost of looking inside during training, `train.analyse_every`.

    python -m benchmarks.analysis --json=benchmarks/results/NAME.json
    python -m benchmarks.analysis --scale=smoke --arm=gshard_2b

Times in one process, interleaved, on the text of the config:

    steps       the training step, with its data, STEPS of them
    routing     the routing of the first held-out tokens
    analysis    the routing, its cheap tables beside those of an earlier step, and their files

`in_steps` is how many training steps an analysis takes, the median over rounds of (analysis / a
step in the same round); `two_percent_every` the smallest `train.analyse_every` with which it takes
at most 2 % of the time of training.
"""

import itertools
import math
import statistics
import tempfile
from pathlib import Path

import jax

import configs
from benchmarks import harness
from dsmoe_jax.analysis import over_training
from dsmoe_jax.analysis.over_training import OverTraining
from dsmoe_jax.analysis.routed_text import RoutedText, with_routing
from dsmoe_jax.config import from_config_dict, replace, stage_of
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.stages import StageRun
from dsmoe_jax.training.start import init_state

STEPS = 20  # of a round
SHARE = 0.02  # of the time of training that an analysis may take


class Cases:
    """A timed call, which goes on where the last one stopped."""

    def __init__(self, arm: str, scale: str, directory: Path):
        config = replace(from_config_dict(configs.load(arm, scale)), **{"train.analyse_every": 1})
        self.corpus = open_corpus(config.data)
        self.stage = StageRun(stage_of(config, 1), self.corpus)
        self.state = init_state(config)
        self.n_experts = config.model.moe.n_routed_experts
        self.tables = OverTraining(directory)
        self.numbers = itertools.count(1)
        self.text: RoutedText

    def steps(self) -> None:
        """Trains on the next batches."""
        for _ in range(STEPS):
            batch = self.stage.next_batch(1)
            self.state, metrics = self.stage.train_step(self.state, batch)
        jax.block_until_ready(metrics.loss)

    def routing(self) -> None:
        """Routes held-out text."""
        routings = self.stage.held_out.routings(self.state.params, self.state.other)
        self.text = with_routing(
            self.corpus, routings, self.n_experts, max_tokens=over_training.TOKENS
        )

    def analysis(self) -> None:
        """Routes it, makes the tables and writes them."""
        self.routing()
        step = next(self.numbers)
        found = self.tables.compute(step, self.text)
        over_training.row(found)
        self.tables.finish(step, found)


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    parser = harness.flag_parser("benchmarks.analysis", __doc__, repeats=15)
    parser.add_argument("--scale", default="demo", help="of the model (default demo)")
    parser.add_argument("--arm", default="dsmoe_2b", help="config (default dsmoe_2b)")
    flags = parser.parse_args(argv)
    config = from_config_dict(configs.load(flags.arm, flags.scale))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(open_mesh(config)):
        cases = Cases(flags.arm, flags.scale, Path(folder))
        calls = {"steps": cases.steps, "routing": cases.routing, "analysis": cases.analysis}
        seconds = harness.interleaved(calls, flags.repeats)
    in_steps = STEPS * harness.ratio(seconds["analysis"], seconds["steps"])
    report = harness.device_header() | {
        "freed_memory_kept": kept,
        "repeats": flags.repeats,
        "config": f"{flags.arm}:{flags.scale}",
        "tokens": cases.text.n_tokens,
        "step_ms": 1e3 * statistics.median(seconds["steps"]) / STEPS,
        "routing_ms": 1e3 * statistics.median(seconds["routing"]),
        "analysis_ms": 1e3 * statistics.median(seconds["analysis"]),
        "in_steps": in_steps,
        "two_percent_every": math.ceil(in_steps / SHARE),
    }
    print(harness.table([report]))
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()

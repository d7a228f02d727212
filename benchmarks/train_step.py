"""The whole training step of table 1's models: how long it takes, and where the time goes.

    python -m benchmarks.train_step --scale=demo
    python -m benchmarks.train_step --scale=demo --hf --json=benchmarks/results/NAME.json

The models train on their own text, interleaved in one process: in each round every model makes so
many steps.  `per FLOP` is the median over rounds of (its time a FLOP / the dense model's in the
same round); FLOPs are those of `size.train_flops_per_token`.  Validation, checkpoints and
compilation are not timed.

Then one round of each model is traced, and the time of every operation of the compiled program is
added up by the part of the model that it belongs to.  Operations that run at the same time on
several threads are added too, so the parts together can be more than the step.

`--hf` adds transformers' DeepSeek-V3 on torch with the sizes of DeepSeekMoE: the same number of
layers, experts, heads and tokens, its own sigmoid router, MLA without compression of queries, no
balance loss, AdamW.  It has rounds of its own, since torch keeps threads of its own.
"""

from __future__ import annotations

import collections
import glob
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax

from benchmarks import harness
from configs.base import SCALES
from dsmoe_jax.config import Config, replace, stages_of
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.model.size import train_flops_per_token
from dsmoe_jax.planning import hlo, memory_traffic
from dsmoe_jax.study.experiment import Arm
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.stages import StageRun
from dsmoe_jax.training.start import init_state
from experiments.v1 import table1

ARMS = {arm.label: arm for arm in table1.EXPERIMENT.arms if isinstance(arm, Arm)}
DENSE = "Dense"
STEPS = 5  # of a model in a round
WARM_UP = 4  # rounds that do not count


class Training:
    """A call trains a model for `STEPS` more steps and waits for them."""

    def __init__(self, config: Config):
        self.config = config
        corpus = open_corpus(config.data)
        run = StageRun(stages_of(config)[0], corpus)
        self.state = init_state(config, lambda: corpus.token_counts_V)
        self.batches = [run.next_batch(step) for step in range(1, STEPS + 1)]
        step: Any = run.train_step
        self.compiled = step.lower(self.state, self.batches[0]).compile()

    def __call__(self) -> None:
        for batch in self.batches:
            self.state, _ = self.compiled(self.state, batch)
        jax.block_until_ready(self.state)

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        return train_flops_per_token(self.config) * self.config.tokens_per_step


def seconds_by_operation(trained: Training) -> dict[str, float]:
    """Seconds of a step by instruction of its program, from a trace of one round."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            trained()
        (path,) = glob.glob(f"{directory}/plugins/profile/*/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(path)
    seconds: dict[str, float] = collections.defaultdict(float)
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    seconds[event.name] += event.duration_ns / 1e9 / STEPS
    return seconds


def scopes_of(program: str) -> dict[str, str]:
    """The part of the model that each instruction of a program belongs to."""
    computations = hlo.parse(program).computations.values()
    return {
        i.name: memory_traffic.scope_of(i.words) or memory_traffic.OTHER
        for instructions in computations
        for i in instructions
    }


def by_scope(seconds: dict[str, float], scopes: dict[str, str]) -> dict[str, float]:
    """Milliseconds of a step by part of the model."""
    total = dict.fromkeys(memory_traffic.ALL_SCOPES, 0.0)
    for name, spent in seconds.items():
        total[scopes.get(name, memory_traffic.OTHER)] += 1e3 * spent
    return total


def row_of(name: str, flops: float, tokens: int, times: list[float]) -> dict[str, Any]:
    """The row of a model whose rounds took these seconds."""
    step = statistics.median(times) / STEPS
    return {
        "model": name,
        "ms a step": 1e3 * step,
        "tokens/s": tokens / step,
        "GFLOP": flops / 1e9,
        "GFLOP/s": flops / step / 1e9,
        "per FLOP / dense": None,
    }


def rows_of(models: dict[str, Training], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each model, with the ratio to the dense one."""
    rows = []
    for name, model in models.items():
        row = row_of(name, model.flops, model.config.tokens_per_step, seconds[name])
        time_ratio = harness.ratio(seconds[name], seconds[DENSE])
        row["per FLOP / dense"] = time_ratio * models[DENSE].flops / model.flops
        rows.append(row)
    return rows


def hugging_face(config: Config, repeats: int) -> dict[str, Any]:
    """The row of transformers' DeepSeek-V3 of the sizes of a config."""
    import torch
    import transformers

    model, moe, attention = config.model, config.model.moe, config.model.attention
    sizes = transformers.DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        first_k_dense_replace=model.first_k_dense_replace,
        num_attention_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_attention_heads,
        kv_lora_rank=model.hidden_size,
        q_lora_rank=None,  # pyright: ignore - no compression of queries
        qk_rope_head_dim=attention.head_dim // 4 * 2,
        qk_nope_head_dim=attention.head_dim - attention.head_dim // 4 * 2,
        v_head_dim=attention.head_dim,
        n_routed_experts=moe.n_routed_experts,
        n_shared_experts=moe.n_shared_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        moe_intermediate_size=moe.moe_intermediate_size,
        n_group=1,
        topk_group=1,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    network = transformers.DeepseekV3ForCausalLM(sizes)
    rate = config.optimizer.peak_learning_rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, fused=True)
    rows = config.train.global_batch_size
    tokens = torch.randint(0, model.vocab_size, (rows, config.data.sequence_length))

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            network(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

    seconds = []
    for round_ in range(-1, repeats):
        start = time.perf_counter()
        train()
        if round_ >= 0:
            seconds.append(time.perf_counter() - start)
    flops = train_flops_per_token(config) * config.tokens_per_step
    name = f"transformers {transformers.__version__} on torch {torch.__version__}"
    return row_of(name, flops, config.tokens_per_step, seconds)


def parse(argv: list[str] | None) -> Any:
    """The flags of the command line."""
    parser = harness.flag_parser("benchmarks.train_step", __doc__, repeats=15)
    parser.add_argument("--scale", default="demo", choices=SCALES)
    parser.add_argument("--corpus", help="for the scales that have none of their own")
    parser.add_argument("--arms", default=",".join(ARMS), help="of table 1, by label; with Dense")
    parser.add_argument("--hf", action="store_true", help="transformers on torch beside them")
    flags = parser.parse_args(argv)
    flags.arms = flags.arms.split(",")
    unknown = [name for name in flags.arms if name not in ARMS]
    if unknown or DENSE not in flags.arms:
        parser.error(f"--arms: must be Dense and others of {', '.join(ARMS)}")
    return flags


def parts_of(name: str, scopes: dict[str, float]) -> dict[str, Any]:
    """The row of a model with the milliseconds of its parts."""
    return {"model": name, **scopes, "sum": sum(scopes.values())}


def trace(models: Iterable[tuple[str, Training]]) -> list[dict[str, Any]]:
    """A row for each model: milliseconds of a step by part."""
    rows = []
    for name, model in models:
        print(f"tracing {name}", file=sys.stderr)
        scopes = by_scope(seconds_by_operation(model), scopes_of(model.compiled.as_text()))
        rows.append(parts_of(name, scopes))
    return rows


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    flags = parse(argv)
    changes = {} if flags.corpus is None else {"data.corpus": flags.corpus}
    configs = {n: replace(ARMS[n].run_config(flags.scale, 0), **changes) for n in flags.arms}
    with jax.set_mesh(open_mesh(configs[DENSE])):
        models = {}
        for name, config in configs.items():
            print(f"preparing {name}", file=sys.stderr)
            models[name] = Training(config)
        rows = rows_of(models, harness.interleaved(models, flags.repeats, WARM_UP))
        parts = trace(models.items())
    if flags.hf:
        rows.append(hugging_face(configs["DeepSeekMoE"], flags.repeats))
    report = {
        **harness.device_header(),
        "freed_memory_kept": kept,
        "scale": flags.scale,
        "repeats": flags.repeats,
        "steps_a_round": STEPS,
        "rows": rows,
        "ms_by_part": parts,
    }
    print(harness.table(rows))
    print("\nms a step by part of the model\n")
    print(harness.table(parts))
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()

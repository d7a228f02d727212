"""Parameters and FLOPs: of the real module, by a formula, and by hand."""

import json
import re
import subprocess
import sys

import pytest

import configs
from dsmoe_jax.commands import count
from dsmoe_jax.config import AttentionConfig, ModelConfig, from_config_dict, replace
from dsmoe_jax.model import size
from dsmoe_jax.planning.plan_report import stage_to_plan
from tests.tools.patience import PATIENCE


def load(name, arg="paper"):
    return from_config_dict(configs.load(name, arg))


@pytest.mark.parametrize("name", configs.names())
@pytest.mark.parametrize("scale", ["paper", "demo"])
def test_module_equals_formula(name, scale):
    model = load(name, scale).model
    assert size.count_parameters(model) == size.parameters_by_formula(model)


def test_flops_at_used_widths_by_hand():
    """A model small enough to add up: every matrix product counts 6 FLOPs a weight and token."""
    config = replace(load("dsmoe_16b", "smoke"), **{"model.attention.num_key_value_heads": 1})
    d, n, kv = 48, 64, 24
    attention = 2 * (2 * d * d + 2 * d * kv)
    ffn = 3 * d * 256 + 3 * d * 32 * (2 + 6) + 64 * d  # dense layer; experts; router
    head = 512 * d
    by_hand = 6 * (attention + ffn + head) + 12 * 2 * n * d
    assert size.train_flops_per_token(config) == by_hand


@pytest.mark.parametrize("name", ["dense_2b", "dsmoe_2b", "dsmoe_16b"])
def test_used_and_nominal_flops_are_close(name):
    config = load(name)
    used = size.train_flops_per_token(config) * config.data.sequence_length
    assert used == pytest.approx(size.flops_per_sequence(config), rel=0.03)


@pytest.mark.parametrize(
    ("layers", "attends", "thousands"),
    [
        (27, {"name": "latent", "num_attention_heads": 16}, 15.6),
        (60, {"name": "latent", "num_attention_heads": 128}, 34.6),
        (27, {"num_attention_heads": 16, "head_dim": 128}, 110.6),
    ],
)
def test_bytes_of_a_cache_are_those_that_v2_prints(layers, attends, thousands):
    """Numbers for each token, V2 (2405.04434) table 9: latent attention of two sizes, all heads."""
    attends = AttentionConfig(**attends)
    model = ModelConfig(num_hidden_layers=layers, compute_dtype="bfloat16", attention=attends)
    assert round(size.cache_bytes_per_token(model) / 2 / 1000, 1) == thousands


def test_state_bytes():
    assert sum(size.state_bytes(10).values()) == 160  # 4 + 4 + 4 + 4 bytes a parameter


def test_an_override_hides_the_papers_figures():
    config = load("dsmoe_2b")
    assert count.report(config)["paper"]["expert_total"] == 1.89e9
    assert count.report(replace(config, **{"model.num_hidden_layers": 2}))["paper"] == {}
    assert count.report(replace(config, **{"data.sequence_length": 64}))["paper"] == {}
    assert count.report(load("dsmoe_2b", "smoke"))["paper"] == {}
    assert count.report(load("dsmoe_2b", "paper,shared=2"))["paper"] == {}  # a loss, no figures


STAGES = {
    "train.steps": 100,
    "train.stages.share": (0.3, 0.5, 0.2),
    "train.stages.train.global_batch_size": (16, 8, 4),
    "train.stages.model.moe.num_experts_per_tok": (1, 2, 6),
}


def test_figures_of_stages_are_means_over_their_tokens():
    """30 steps of 16 sequences, 50 of 8, 20 of 4: 480, 400 and 80 of 960 sequences."""
    config = load("dsmoe_16b", "smoke")
    by_k = {k: replace(config, **{"model.moe.num_experts_per_tok": k}) for k in (1, 2, 6)}
    staged = replace(config, **STAGES)
    weights = {1: 480 / 960, 2: 400 / 960, 6: 80 / 960}

    def mean(figure):
        return sum(weights[k] * figure(by_k[k]) for k in by_k)

    found = size.account(staged)
    for key in ("activated", "expert_activated", "flops_per_sequence"):
        assert found[key] == pytest.approx(mean(lambda c, key=key: size.account(c)[key])), key
    for key in ("total", "expert_total"):
        assert found[key] == size.account(config)[key], key
    assert size.train_flops_per_token(staged) == pytest.approx(mean(size.train_flops_per_token))
    assert size.flops_per_sequence(staged) == found["flops_per_sequence"]


def test_count_has_a_row_for_each_stage():
    staged = replace(load("dsmoe_2b"), **STAGES)
    rows = count.table([staged]).splitlines()
    assert rows[1].startswith("dsmoe_2b ")
    assert [row.split(" of the")[0].strip() for row in rows[2:]] == [
        "steps 1 to 30, 50 %", "steps 31 to 80, 41.7 %", "steps 81 to 100, 8.33 %"
    ]  # fmt: skip
    assert "/ " not in rows[1], "the paper has no such model"
    report = count.report(staged)
    assert report["paper"] == {}
    tokens = [stage["tokens"] for stage in report["stages"]]
    assert tokens == [480 * 2048, 400 * 2048, 80 * 2048]
    activated = [stage["activated"] for stage in report["stages"]]
    want = sum(n * a for n, a in zip(tokens, activated, strict=True)) / sum(tokens)
    assert report["activated"] == pytest.approx(want)
    assert count.report(load("dsmoe_2b"))["stages"] == []


def test_a_mesh_is_planned_for_the_stage_with_the_most_work():
    """FLOPs a step: 16 sequences with K = 1, 8 with 2, 4 with 6; then the last as large."""
    staged = replace(load("dsmoe_16b", "smoke"), **STAGES)
    config, note = stage_to_plan(staged)
    assert (config.train.global_batch_size, config.model.moe.num_experts_per_tok) == (16, 1)
    assert "steps 1 to 30" in note
    larger = {"train.stages.train.global_batch_size": (16, 8, 16)}
    config, note = stage_to_plan(replace(staged, **larger))
    assert config.model.moe.num_experts_per_tok == 6
    assert stage_to_plan(load("dsmoe_16b")) == (load("dsmoe_16b"), "")


# Not ru_maxrss: a child begins with that of the process that it was forked from.
COUNT_AND_WEIGH = """
import re
from dsmoe_jax.commands import command_line, count
command_line.parse(["--config=configs/dsmoe_145b.py", "--json"])
count.main()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_the_largest_model_counts_in_little_memory():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_AND_WEIGH], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    output, _, kilobytes = done.stdout.rstrip().rpartition("\n")
    assert int(kilobytes) < 2e6
    figures = json.loads(output)
    assert figures["total"] == pytest.approx(144.6e9, rel=0.001)
    assert figures["paper"] == {
        "total": 144.6e9, "activated": 22.2e9, "flops_per_sequence": 585.6e12
    }  # fmt: skip


def test_the_table_shows_both_numbers():
    some = [load(name) for name in ("dsmoe_16b", "dsmoe_142b_half")]
    text = count.table(some)
    assert re.search(r"dsmoe_16b +16\.38B / 16\.4B +2\.829B / 2\.8B", text)
    assert re.search(r"13\.61B / 12\.2B \(\+\d+\.\d+%\) !", text)
    assert "not reproducible" in text

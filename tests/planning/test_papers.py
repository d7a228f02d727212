"""Our models reproduce the figures that papers print, and no other file prints them differently."""

import importlib
import re

import pytest

import configs
from dsmoe_jax.config import Config, from_config_dict
from dsmoe_jax.model import size
from dsmoe_jax.planning import papers

FIGURES = [(name, figure) for name, model in papers.MODELS.items() for figure in model.figures]
PERCENT = [
    (name, other, percent)
    for name, model in papers.MODELS.items()
    for other, percent in model.flops_percent.items()
]
WITH_FILE = sorted(set(papers.MODELS) & set(configs.names()))
SOURCES = ("V1", "V2", "V3", "Model card", "24")  # the last one: arXiv
# The digits of losses, of numbers of parameters and of FLOPs, and shares of another model's FLOPs.
PRINTED = re.compile(r"\b\d\.\d{3}\b|\b\d+\.\d+[BT]\b|\b\d+\.\d(?= %)")


def load(name: str) -> Config:
    return from_config_dict(configs.load(name))


@pytest.mark.parametrize(("name", "figure"), FIGURES)
def test_the_papers_digits(name, figure):
    config = load(name)
    digits = papers.MODELS[name].figures[figure]
    counted = size.parameters_by_formula(config.model)
    ours = {
        **vars(counted),
        "activated_without_embedding": counted.activated_without_embedding,
        "flops_per_sequence": size.flops_per_sequence(config),
    }[figure]
    within = abs(papers.deviation(ours, digits)) <= papers.TOLERANCE[figure]
    reproducible = figure not in papers.MODELS[name].irreproducible
    assert within == reproducible, f"{ours:.4g} is not {digits}"


def test_what_follows_instead_of_the_irreproducible_figure():
    ours = size.parameters_by_formula(load("dsmoe_142b_half").model).activated
    assert ours == pytest.approx(13.6e9, rel=0.005)


@pytest.mark.parametrize(("name", "other", "percent"), PERCENT)
def test_headline_ratios(name, other, percent):
    ratio = size.flops_per_sequence(load(name)) / size.flops_per_sequence(load(other))
    assert 100 * ratio == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("name", WITH_FILE)
def test_configs_are_built_from_the_table(name):
    config = load(name)
    settings = papers.MODELS[name].settings
    assert config.model.hidden_size == settings.hidden_size
    assert config.model.num_hidden_layers == settings.num_hidden_layers
    assert config.model.vocab_size == settings.vocab_size
    assert config.model.attention.num_attention_heads == settings.num_attention_heads
    assert config.data.sequence_length == settings.sequence_length
    assert config.train.global_batch_size == settings.global_batch_size
    assert config.train.steps == settings.steps
    assert config.optimizer.peak_learning_rate == settings.peak_learning_rate
    assert config.optimizer.decay_at == settings.decay_at


def test_what_has_no_file_is_an_option_of_one():
    """`dsmoe_2b.py:paper,shared=2` is the model that the table calls dsmoe_2b_shared2."""
    without = sorted(set(papers.MODELS) - set(configs.names()))
    assert without == ["dsmoe_2b_shared2", "dsmoe_2b_shared4"]
    for name in without:
        option = f"paper,shared={name[-1]}"
        assert configs.load("dsmoe_2b", option).name == name


def digits_of(*models: papers.Model) -> set[str]:
    """All digits that a paper prints of these models, as docstrings write them."""
    losses = {f"{model.loss:.3f}" for model in models if model.loss is not None}
    figures = {digits for model in models for digits in model.figures.values()}
    percent = {str(percent) for model in models for percent in model.flops_percent.values()}
    return losses | figures | percent


@pytest.mark.parametrize("name", WITH_FILE)
def test_docstrings_of_config_files_print_what_the_table_has(name):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    *_, result = text.strip().split("\n\n")
    assert result.startswith(SOURCES)
    found = set(PRINTED.findall(re.sub(r"\(ours[^)]*\)", "", result)))
    own = papers.MODELS[name]
    variants = [m for other, m in papers.MODELS.items() if other.startswith(f"{name}_shared")]
    assert found <= digits_of(own, *variants)
    # The loss and the FLOPs, where the paper prints them, are among them.
    assert found >= {f"{model.loss:.3f}" for model in (own, *variants) if model.loss is not None}
    assert own.flops_per_sequence is None or own.flops_per_sequence in found


@pytest.mark.parametrize("digits", ["2.0B", "585.6T", "2057.5T", "39.6%", "9%"])
@pytest.mark.parametrize("tolerance", [0.0, 0.003])
def test_accepted_numbers_are_those_within_the_tolerance(digits, tolerance):
    low, high = papers.accepted(digits, tolerance)
    printed = papers.value(digits)
    assert (low + high) / 2 == pytest.approx(printed)
    for end, outwards in ((low, -1), (high, 1)):
        assert abs(papers.deviation(end - outwards * 1e-6 * printed, digits)) <= tolerance
        assert abs(papers.deviation(end + outwards * 1e-6 * printed, digits)) > tolerance


def test_deviation_is_measured_from_the_printed_digits():
    assert papers.value("24.6T") == 24.6e12
    assert papers.deviation(1.95e9, "2.0B") == 0
    assert papers.deviation(2.05e9, "2.0B") == 0
    assert papers.deviation(2.15e9, "2.0B") == pytest.approx(0.05)
    assert papers.deviation(1.85e9, "2.0B") == pytest.approx(-0.05)
    assert papers.deviation(2057.65e12, "2057.5T") == pytest.approx(0.1 / 2057.5)
    assert papers.accepted("39.6%") == pytest.approx((39.55, 39.65))

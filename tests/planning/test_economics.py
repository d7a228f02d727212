"""Costs of training and decoding against arithmetic by hand, enumeration and published totals."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsmoe_jax.config import from_config_dict
from dsmoe_jax.hardware.chips import CHIPS, Chip
from dsmoe_jax.model import size
from dsmoe_jax.planning import economics, economics_report, prices
from dsmoe_jax.planning.economics import Deal
from tests.tools.tiny import tiny


def load(name):
    return from_config_dict(configs.load(name))


def test_mixtral_by_hand():
    """L 32, d 4096, 32 heads and 8 for keys of 128, V 32000, 8 experts of 14336."""
    model = economics.of_model(load("mixtral_8x7b").model, context=1000)
    d, layers, v = 4096, 32, 32000
    attention = 2 * d * d + 2 * d * 1024
    expert = 3 * d * 14336
    others = layers * (attention + 8 * d + 2 * d) + 2 * v * d + d
    assert model.parameters == others + layers * 8 * expert
    assert model.bytes == 2 * model.parameters
    assert model.routed == 2 * layers * 8 * expert
    assert model.always == 2 * (others - v * d)
    assert model.cache == layers * 2 * 1024 * 2
    products = layers * (attention + 8 * d + 2 * expert) + v * d
    assert model.flops == 2 * products + layers * 4 * 1000 * d
    assert model.touched(1) == pytest.approx(2 / 8)
    assert model.touched(3) == pytest.approx(1 - 0.75**3)
    read = model.always + (1 - 0.75**3) * model.routed + 3 * 1000 * model.cache
    assert model.bytes_read(3) == pytest.approx(read)
    chip = Chip((), peak_flops=1e15, hbm_gb=100, hbm_bandwidth=1e12, link_bandwidth=1)
    assert model.chip_seconds(3, chip) == pytest.approx(read / 1e12 / 3)
    slow = Chip((), peak_flops=1e10, hbm_gb=100, hbm_bandwidth=1e12, link_bandwidth=1)
    assert model.chip_seconds(3, slow) == pytest.approx(model.flops / 1e10)
    assert model.chips(1, chip) == 2  # 93.4 GB of the 90 that are used of 100
    assert 93e9 < model.bytes < 94e9


def test_deepseek_v3_decodes_with_latents():
    """576 numbers of 2 bytes a layer; scores of 512 + 64 and values of 512, for 128 heads."""
    model = load("deepseek_v3").model
    found = economics.of_model(model, context=4096)
    assert found.cache == 61 * 576 * 2
    without = economics.of_model(model, context=0)
    assert found.flops - without.flops == 61 * 2 * 4096 * 128 * (576 + 512)
    # 37B activated, of which the embedding (129280 x 7168) is not multiplied.
    assert without.flops / 2 == pytest.approx(37e9 - 129280 * 7168, rel=0.02)
    assert found.parameters == pytest.approx(671e9, rel=0.01)


def test_decoding_is_a_third_of_training():
    """An attention without another way to decode: 2 of 6 FLOPs, at the same length."""
    config = tiny()
    decoding = size.decode_flops_per_token(config.model, config.data.sequence_length)
    assert decoding == pytest.approx(size.train_flops_per_token(config) / 3)


def test_training_of_the_paper():
    """74.4T FLOPs a sequence of 4096 at nominal widths, 2T tokens (V1 5.1.2)."""
    training = economics.of_training(load("dsmoe_16b"))
    assert training.tokens == 106_449 * 4608 * 4096
    assert training.flops == pytest.approx(74.4e12 * 106_449 * 4608, rel=0.03)
    hours = training.chip_hours(CHIPS["h100"], mfu=0.5)
    assert hours == pytest.approx(training.flops / 0.5 / 989e12 / 3600)


@pytest.mark.parametrize(("e", "k", "batch"), [(4, 2, 1), (4, 2, 3), (5, 1, 3), (3, 2, 4)])
def test_touched_experts_against_all_choices(e, k, batch):
    config = tiny(**{"model.moe.n_routed_experts": e, "model.moe.num_experts_per_tok": k})
    choices = list(itertools.combinations(range(e), k))
    counts = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=batch)]
    found = economics.of_model(config.model, context=1).touched(batch)
    assert found == pytest.approx(np.mean(counts) / e)


def test_touched_experts_by_recorded_loads():
    """Two experts of four take all tokens in one layer; the other layer is even."""
    config = tiny()
    load_LE = np.array([[50, 50, 0, 0], [25, 25, 25, 25]])
    model = economics.of_model(config.model, 1, load_LE)
    assert model.touched(1) == pytest.approx(0.5)
    assert model.touched(4) == pytest.approx((0.5 + 1 - 0.5**4) / 2)


def test_more_tokens_touch_more_experts():
    model = economics.of_model(tiny().model, 1)
    touched = [model.touched(batch) for batch in range(1, 100)]
    assert touched[0] == 0.5
    assert sorted(touched) == touched
    assert touched[-1] <= 1


def test_a_dense_model_reads_all_but_its_embedding():
    dense = {"model.moe.n_routed_experts": 0, "model.moe.num_experts_per_tok": 0,
             "model.moe.balance": {}}  # fmt: skip
    config = tiny(**dense)
    model = economics.of_model(config.model, 7, weight_bytes=1)
    assert model.bytes == model.parameters
    assert model.bytes_read(2) == model.parameters - 512 * 32 + 2 * 7 * model.cache
    assert model.touched(3) == 0


def test_experts_in_8_bits():
    half = economics.of_model(load("mixtral_8x7b").model, 1, expert_bytes=1)
    whole = economics.of_model(load("mixtral_8x7b").model, 1)
    assert half.routed * 2 == whole.routed
    assert whole.bytes - half.bytes == half.routed
    assert half.always == whole.always


def test_break_even_of_tokens():
    """100 + 2 n = 400 + n at n = 300."""
    assert economics.break_even_tokens(Deal(100, 2, 1), Deal(400, 1, 1)) == 300
    assert economics.break_even_tokens(Deal(400, 1, 1), Deal(100, 2, 1)) == 300
    assert economics.break_even_tokens(Deal(100, 1, 1), Deal(400, 2, 1)) is None
    assert economics.break_even_tokens(Deal(100, 1, 1), Deal(400, 1, 1)) is None


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 50), st.integers(1, 50))
def test_break_even_of_traffic_is_where_the_costs_cross(n, m, s, t):
    one, other = Deal(0, s / 100, n), Deal(0, t / 100, m)

    def cost(deal, rate):
        return max(deal.chips, rate * deal.token)

    rate = economics.break_even_rate(one, other)
    few, many = sorted((one, other), key=lambda deal: deal.chips)
    if rate is None:
        assert all(cost(few, r) <= cost(many, r) or few.chips == many.chips for r in range(2000))
        return
    assert cost(few, rate) == pytest.approx(cost(many, rate))
    assert cost(few, 0.99 * rate) < cost(many, 0.99 * rate)
    assert cost(few, 1.5 * rate) >= cost(many, 1.5 * rate)


def test_break_even_of_memory():
    """1000 tokens an hour: 3 chip-hours saved for 10 GB more."""
    sparse = economics.of_model(load("mixtral_8x7b").model, 1)
    dense = economics.of_model(load("deepseek_7b").model, 1)
    gb = (sparse.bytes - dense.bytes) / 1e9
    found = economics.break_even_memory(sparse, dense, (0.001, 0.004), 1000)
    assert found == pytest.approx(3 / gb)
    assert economics.break_even_memory(dense, sparse, (0.004, 0.001), 1000) == pytest.approx(found)
    assert economics.break_even_memory(sparse, dense, (0.004, 0.001), 1000) is None


def test_intervals_of_batches():
    sparse = economics.of_model(load("dsmoe_16b").model, 512)
    dense = economics.of_model(load("deepseek_7b").model, 512)
    chip = CHIPS["h100"]
    found = economics.faster_by_batch(sparse, dense, chip, range(1, 300))
    assert [interval.faster for interval in found] == [0, 1, 0]
    assert [found[0].first, found[-1].last] == [1, 299]
    for interval in found:
        for batch in (interval.first, interval.last):
            seconds = [model.chip_seconds(batch, chip) for model in (sparse, dense)]
            assert np.argmin(seconds) == interval.faster
    assert all(b.first == a.last + 1 for a, b in itertools.pairwise(found))


TABLE = 'currency = "EUR"\n[chip_hour]\nh100 = 2.0\n[memory]\ngb_hour = 0.01\n'


def test_a_table_of_prices(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(TABLE)
    found = prices.read(str(path), "h100")
    assert found == ("EUR", {"h100": 2.0}, 0.01)
    setting = economics_report.Setting("h100", [1], 64, prices=found, rate=100.0)
    report = economics_report.report([load("dsmoe_16b"), load("deepseek_7b")], setting, [None] * 2)
    sparse = report["models"][0]
    assert sparse["training"]["money"] == 2 * sparse["training"]["chip_hours"]
    (decoding,) = sparse["decoding"]
    assert decoding["money_per_million"] == pytest.approx(
        1e6 / decoding["tokens_per_second"] / 3600 * 2
    )
    (row,) = report["beside"][0]["break_even"]
    assert row["gb_hour"] == 2 * row["gb_hour_in_chip_hours"]
    text = economics_report.text(report, found)
    assert "| training, EUR | 20.9K | 50.8K |" in text
    assert "| 1 | dsmoe_16b always |" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("currency", "not TOML"),
        ("x = 1\n" + TABLE, "x: no such key; known: currency, chip_hour, memory"),
        (TABLE.replace('"EUR"', "3"), "currency=3: must be a name"),
        (
            TABLE.replace("h100", "v5e"),
            r"chip_hour\.h100: missing; the price of an hour of --chip=",
        ),
        (TABLE.replace("h100", "h1000"), r"chip_hour\.h1000: no such key; known: v4, v5e"),
        (TABLE.replace("2.0", "-2"), r"chip_hour\.h100=-2: must be a number above 0"),
        (TABLE.replace("2.0", "nan"), r"chip_hour\.h100=nan: must be a number above 0"),
        (TABLE.replace("2.0", "true"), r"chip_hour\.h100=True: must be a number above 0"),
        (TABLE.replace("gb_hour", "mb"), r"memory\.mb: no such key; known: gb_hour"),
        ('currency = "EUR"\nchip_hour = 3\n', r"chip_hour=3: must be a section \[chip_hour\]"),
    ],
)
def test_bad_tables_of_prices(tmp_path, text, message):
    path = tmp_path / "prices.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"^--prices={path}: {message}"):
        prices.read(str(path), "h100")

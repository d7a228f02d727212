"""The table of chips, found by the names that JAX gives devices."""

import types

import jax
import pytest

from dsmoe_jax.hardware.chips import CHIPS, TPUS, chip_of
from dsmoe_jax.hardware.peak import peak_flops


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),  # begins with "TPU v5" too
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_chip_by_the_name_of_its_devices(device_kind, name):
    assert chip_of(device_kind) is CHIPS[name]


def test_a_chip_that_is_not_listed():
    assert chip_of("cpu") is None


def test_slices_are_of_tpus():
    assert TPUS == ("v4", "v5e", "v5p", "v6e")


@pytest.mark.parametrize(("kind", "peak"), [("NVIDIA H100 PCIe", 4 * 989e12), ("TPU v99", None)])
def test_peak_of_all_devices_together(monkeypatch, kind, peak):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops.__wrapped__() == peak

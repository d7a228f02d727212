"""Threads for collectives that wait for each other."""

import os

import pytest

from dsmoe_jax.hardware.virtual_devices import allow_waiting

FLAG = "--xla_force_host_platform_device_count"


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """Neither XLA's flag nor JAX's nor a number of threads."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def threads() -> str | None:
    """The variable that XLA will read."""
    return os.environ.get("NPROC")


def test_one_device_keeps_the_threads_of_its_cores():
    allow_waiting()
    assert threads() is None


@pytest.mark.parametrize(
    "flags", [f"{FLAG}=8", f"--xla_cpu_use_fusion_emitters=false {FLAG}=2 {FLAG}=8"]
)
def test_xla_flag(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    allow_waiting()
    assert threads() == "128"


def test_jax_flag(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    allow_waiting()
    assert threads() == "32"


def test_number_that_a_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("NPROC", "40")
    allow_waiting(devices=8)
    assert threads() == "40"

"""All tests compile quickly, and those that ask for it as outside of tests."""

import os

import jax


def little_optimisation() -> bool:
    return jax.config.read("jax_disable_most_optimizations")


def test_all_tests_and_their_processes_compile_quickly():
    assert little_optimisation()
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "True"
    assert "fusion_emitters=false" in os.environ["XLA_FLAGS"]


def test_full_optimisation(full_optimisation):
    assert not little_optimisation()
    assert "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ

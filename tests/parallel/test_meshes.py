"""Training on every mesh of eight virtual devices is training on one device; so is resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLOAT32 = 2e-6  # reductions in another order
# Twenty AdamW steps amplify them: where a gradient is almost 0 its sign decides the update.
AFTER_TWENTY_STEPS = 1e-3
MOE = "['state'].params['layers']['moe']"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What eight_devices.py wrote: one entry a mesh."""
    out = tmp_path_factory.mktemp("meshes")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8"
        " --xla_cpu_use_fusion_emitters=false",  # compiles faster
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": os.getcwd(),
    }
    command = [sys.executable, str(HERE / "eight_devices.py"), str(out)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    return json.loads((out / "results.json").read_text())


def name(result):
    return " x ".join(f"{axis} {size}" for axis, size in result["sizes"].items()) or "one device"


def test_loss_gradients_and_update_are_those_of_one_device(results):
    """The first moments are the gradients (clipping is off), so their scale is seen too."""
    meshes = [result for result in results if result["sizes"]]
    assert len(meshes) >= 3
    for result in meshes:
        errors = result["errors"]
        assert sum("mu" in key for key in errors) > 15
        assert "['metrics'].router.load_E" in errors
        wrong = {key: error for key, error in errors.items() if not error < FLOAT32}
        assert not wrong, name(result)


@pytest.mark.parametrize("prefix", ["params", "opt_state[1][0].mu", "opt_state[1][0].nu"])
def test_parameters_and_both_moments_are_in_shards(results, prefix):
    shapes = {}
    for result in results:
        for key, sharding in result["shardings"].items():
            if key.startswith(f"['state'].{prefix}["):
                leaf = key.removeprefix(f"['state'].{prefix}").removesuffix(".value")
                shapes.setdefault(name(result), {})[leaf] = sharding["shard"]
    # Whole: layers 1, E 8, F 16, D 32; N 4, H 8; V 64.
    gate, router, query = (
        "['layers']['moe']['gate_EFD']",
        "['layers']['moe']['router_ED']",
        "['layers']['attention']['query_NHD']",
    )
    fsdp, expert, mixed = (
        shapes[name] for name in ("fsdp 8", "data 2 x expert 4", "fsdp 2 x expert 2 x tensor 2")
    )
    assert fsdp[gate] == [1, 8, 16, 4]
    assert expert[gate] == [1, 2, 16, 32]
    assert mixed[gate] == [1, 4, 8, 16]
    assert mixed["['layers']['moe']['down_EDF']"] == [1, 4, 16, 8]
    assert mixed["['layers']['moe']['shared']['gate_FD']"] == [1, 8, 8]
    assert mixed["['leading'][0]['ffn']['down_DF']"] == [8, 16]
    assert mixed["['embedding_VD']"] == [32, 8]
    assert fsdp[query] == [1, 4, 8, 4]
    assert expert[query] == [1, 4, 8, 8]
    assert mixed[query] == [1, 2, 8, 8]
    assert mixed[router] == [1, 4, 16]
    assert mixed["['final_norm']['scale_D']"] == [32]


def test_resuming_on_another_mesh_changes_nothing(results):
    """one device -> fsdp 8 -> expert 4 -> fsdp 2, expert 2, tensor 2 -> one device.

    Each goes on from the checkpoint after the first step; the next 20 losses are the unbroken
    run's, and so are parameters, both moments and the balance bias at the end.
    """
    assert results[-1]["sizes"] == {}
    for result in results:
        assert len(result["losses"]) == 20
        assert result["losses"][-1] < result["losses"][0]
        assert result["resumed_losses"] == pytest.approx(result["losses"], rel=1e-5), name(result)
        errors = result["resumed_errors"]
        assert any("bias_E" in key for key in errors)
        wrong = {key: error for key, error in errors.items() if not error < AFTER_TWENTY_STEPS}
        assert not wrong, name(result)

"""The beginning of a run: fresh, resumed, or with the parameters of another run."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.data import opening
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_evaluation
from dsmoe_jax.training import start
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.start import TRAINING, from_run, init_state

BIASED = {"model.moe.router.bias_update_speed": 0.01}


@pytest.fixture(scope="module")
def other_run(tiny_config, tmp_path_factory):
    """A run of four steps with a router variable."""
    workdir = tmp_path_factory.mktemp("runs") / "other"
    train(tiny_config(**BIASED, **{"train.steps": 4}), workdir, progress=False)
    return workdir


def arrays_of(state):
    return jax.device_get((state.params, state.other))


def test_from_another_run(other_run, tiny_config):
    """Its parameters and biases; a fresh optimizer at step 0."""
    config = tiny_config(**BIASED, **{"train.start_from": str(other_run)})
    state = from_run(config, opening.open_corpus(config.data))
    fresh = init_state(replace(config, **{"train.start_from": None}))
    params, other = arrays_of(state)
    model = load_run(other_run).model
    np.testing.assert_array_equal(params["head_VD"][...], model.head_VD[...])
    bias_LE = np.asarray(model.layers.moe.bias_E[...])
    assert np.abs(bias_LE).max() > 0
    np.testing.assert_array_equal(other["layers"]["moe"]["bias_E"][...], bias_LE)
    assert int(state.step) == 0
    chex.assert_trees_all_equal(state.opt_state, fresh.opt_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)


def test_a_run_starts_there_and_resumes_its_own(other_run, tiny_config, tmp_path):
    """Its first loss is that of a trained model; it goes on without the other run."""
    moved = shutil.copytree(other_run, tmp_path / "other")
    config = tiny_config(**BIASED, **{"train.start_from": str(moved)})
    short = replace(config, **{"train.steps": 3, "train.eval_every": None})
    train(short, tmp_path / "run", progress=False)
    begun, first = read_rows(tmp_path / "run")[:2]
    assert (begun["step"], first["step"]) == (0, 1)
    assert begun["validation_loss"] == read_evaluation(tmp_path / "run")["before"]["loss"]
    assert first["loss"] < read_rows(other_run)[0]["loss"] - 0.02
    (tmp_path / "run/evaluation.json").unlink()
    shutil.rmtree(moved / "checkpoints" / "4" / TRAINING)  # only the model is read of it
    assert train(short, tmp_path / "run", progress=False).resumed_from == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.moe.n_routed_experts": 8},
         r"parameters/layers/moe/down_EDF is \(2, 4, 32, 16\) there, \(2, 8, 32, 16\) here"),
        ({"model.moe.router.bias_update_speed": None},
         r"router variables/layers/moe/bias_E is \(2, 4\) there, missing here; must be the same"),
        ({"model.moe.n_shared_experts": 0}, r"moe/shared/down_DF is .* there, missing here"),
    ],
)  # fmt: skip
def test_another_model_is_refused(other_run, tiny_config, tmp_path, overrides, message):
    config = tiny_config(**{**BIASED, "train.start_from": str(other_run), **overrides})
    with pytest.raises(ValueError, match=rf"^train\.start_from='.*other': .*{message}") as caught:
        train(config, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_workdir_without_a_model_is_refused(other_run, tiny_config, tmp_path):
    config = tiny_config(**BIASED, **{"train.start_from": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"^train\.start_from='.*none': holds no run \(there is"):
        train(config, tmp_path / "run", progress=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(other_run / "config.json", empty)
    config = tiny_config(**BIASED, **{"train.start_from": str(empty)})
    with pytest.raises(ValueError, match=r"^train\.start_from='.*empty': the run has no check"):
        train(config, tmp_path / "run", progress=False)


def test_another_tokenizer_is_refused(other_run, tiny_config, tmp_path, monkeypatch):
    """The embeddings would stand for other tokens, without a word."""
    monkeypatch.setattr(start, "check_same_tokenizer", opening.check_same_tokenizer)
    monkeypatch.setattr(opening, "tokenizer_fingerprint", lambda corpus: "another")
    config = tiny_config(**BIASED, **{"train.start_from": str(other_run)})
    with pytest.raises(ValueError, match=r"^train\.start_from=.*: its tokenizer is not that of"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.eight_devices
def test_from_a_run_on_another_mesh(tiny_config, tmp_path):
    """Saved in the shards of one mesh, loaded into those of another."""
    sizes = {"model.moe.n_routed_experts": 4, "train.steps": 2, "train.eval_batches": 1,
             "train.global_batch_size": 8}  # fmt: skip
    config = tiny_config(**sizes, **{"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.data": 1})
    train(config, tmp_path / "other", progress=False)
    meshes = [{"mesh.expert": 4, "mesh.fsdp": 2, "mesh.data": 1}, {"mesh.data": 1}]
    found = []
    for mesh in meshes:
        begun = tiny_config(**sizes, **mesh, **{"train.start_from": str(tmp_path / "other")})
        devices = jax.devices()[: 8 if "mesh.expert" in mesh else 1]
        with jax.set_mesh(open_mesh(begun, devices)):
            state = from_run(begun, opening.open_corpus(begun.data))
            assert state.params["head_VD"][...].sharding.mesh == jax.sharding.get_mesh()
            found.append(arrays_of(state))
    chex.assert_trees_all_equal(*found)


def test_a_config_says_where_its_run_began(other_run, tiny_config, tmp_path):
    """Another start is another run."""
    config = tiny_config(**BIASED, **{"train.start_from": str(other_run), "train.steps": 2})
    train(config, tmp_path / "run", progress=False)
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["train"]["start_from"] == str(other_run)
    with pytest.raises(ValueError, match=r"holds a run with another config \(train\.start_from"):
        train(replace(config, **{"train.start_from": None}), tmp_path / "run", progress=False)

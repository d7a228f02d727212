"""A task's dense model: the sum of its experts in numpy, the logits of the mixture, workdirs.

Shapes: E routed experts, K activated ones, D hidden, F width of an expert, W of the new FFN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import replace
from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.hf.workdirs import to_hf
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.size import count_parameters
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.surgery import Subject, one_task, workdirs
from dsmoe_jax.training.loop import train
from tests.model.tiny_model import V, config_of
from tests.surgery import layer_in_numpy
from tests.tools.routing import TASKS

BY_TASK = {"router.name": "task", "router.tasks": TASKS, "balance": {}}


def mixture(**changed):
    keys = {**BY_TASK, **changed}
    return config_of(
        **{key if key.startswith("model.") else f"model.moe.{key}": x for key, x in keys.items()}
    )


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)

    def draw(x):
        if np.issubdtype(x.dtype, np.integer):  # a table
            return rng.permuted(np.resize(np.arange(6), x.shape), axis=-1).astype(x.dtype)
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    return Subject(config, jax.tree.map(draw, model_shapes(config.model)))


def logits(subject, tokens_BS, task_ids_BS=None):
    graph = abstract_model(subject.config.model)
    inputs = ModelInputs(tokens_BS, task_ids_BS=task_ids_BS)
    run = jax.jit(lambda state: nnx.merge(graph, *state).forward(inputs))
    return np.asarray(run(subject.model).logits_BSV)


@settings(max_examples=25)
@given(
    e=st.integers(1, 6), k=st.integers(1, 6), f=st.integers(1, 4), shared=st.integers(0, 5),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_one_wide_ffn_is_the_weighted_sum_of_its_experts(e, k, f, shared, seed):
    rng = np.random.default_rng(seed)
    d = 3
    names = ("gate_FD", "up_FD", "down_DF")
    ids_K = rng.permutation(e)[: min(k, e)]
    gates_K = rng.normal(size=len(ids_K))
    layer = {("ffn_norm", "scale_D"): np.ones(d)}
    for name, shape in (("gate_EFD", (f, d)), ("up_EFD", (f, d)), ("down_EDF", (d, f))):
        layer["moe", name] = rng.normal(size=(e, *shape))
    if shared:
        for name in names:
            layer["moe", "shared", name] = rng.normal(
                size=(d, shared)[:: 1 if "DF" in name else -1]
            )
    x_TD = rng.normal(size=(4, d))
    wanted_TD = np.zeros((4, d))
    if shared:
        wanted_TD += layer_in_numpy.ffn(x_TD, *(layer["moe", "shared", n] for n in names))
    for i, gate in zip(ids_K, gates_K, strict=True):
        weights = (layer["moe", name][i] for name in ("gate_EFD", "up_EFD", "down_EDF"))
        wanted_TD += gate * layer_in_numpy.ffn(x_TD, *weights)
    after = one_task.merged(layer, one_task.Chosen(ids_K, gates_K))
    assert after.keys() == {("ffn_norm", "scale_D"), *(("moe", "shared", n) for n in names)}
    found_TD = layer_in_numpy.ffn(x_TD, *(after["moe", "shared", n] for n in names))
    np.testing.assert_allclose(found_TD, wanted_TD, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {
            "expert.name": "gpt_oss",
            "router.scoring_func": "sigmoid",
            "router.norm_topk_prob": True,
            "router.routed_scaling_factor": 2.5,
            "router.bias_update_speed": 0.01,
            "shared_expert_intermediate_size": 7,
            "model.first_k_dense_replace": 1,
            "model.moe_layer_freq": 2,
            "model.moe_layer_offset": 1,
            "model.mtp.num_nextn_predict_layers": 1,
        },
        {"router.name": "task_table", "n_shared_experts": 0},
    ],
    ids=["biases", "table"],
)
def test_the_logits_are_those_of_the_mixture_on_its_task(changed):
    """On text of another task they are not.  With several stacks, and with no shared expert."""
    before = drawn(mixture(**changed))
    tokens_BS = jnp.tile(jax.random.randint(jax.random.key(5), (1, 8), 0, V), (2, 1))
    after = one_task.extract_task(before, {"task": "de_news"})
    assert after.report["task"] == "de"
    found = logits(after, tokens_BS)
    wanted = logits(before, tokens_BS, jnp.array([[1] * 8, [2] * 8]))
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-5 * scale)
    assert np.abs(found[1] - wanted[1]).max() > 0.1 * scale
    shapes = model_shapes(after.config.model)
    assert jax.tree.map(np.shape, after.model) == jax.tree.map(np.shape, shapes)
    counts = [count_parameters(subject.config.model).total for subject in (before, after)]
    assert [*after.report["parameters"].values()] == counts


@pytest.mark.parametrize(
    ("changed", "task", "message"),
    [
        ({}, "fr", r"^--task='fr': must be one of en, de, code$"),
        (
            {"router.name": "topk", "router.tasks": ()},
            "en",
            r"^--task='en': has no meaning for this model, whose experts are not chosen by task",
        ),
        ({"shared_expert_gate": True}, "en", r"^model\.moe\.shared_expert_gate=True: the shared e"),
        ({"n_identity_experts": 1}, "en", r"^model\.moe\.n_identity_experts=1: they are part of n"),
    ],
)
def test_what_has_no_dense_model_is_refused(changed, task, message):
    config = mixture(**changed)
    with pytest.raises(ValueError, match=message):
        one_task.extract_task(Subject(config, model_shapes(config.model)), {"task": task})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.trainable.experts", ((0, 1), (1,))),
        ("train.stages.model.moe.balance.expert.factor", (0.1, 0.0)),
    ],
)
def test_settings_of_routed_experts_are_not_lost_without_a_word(key, value):
    changes = {"train.trainable.part": "experts"} if "trainable" in key else {}
    if "stages" in key:
        changes = {"train.stages.share": (0.5, 0.5), "model.moe.balance.expert.factor": 0.1}
    config = replace(mixture(), **changes, **{key: value})
    with pytest.raises(ValueError, match=rf"^{key}=.*must be None to operate on it$"):
        one_task.extract_task(Subject(config, model_shapes(config.model)), {"task": "en"})


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """A run of two steps, whose tasks are the domains of its corpus."""
    changes = {
        "model.moe.router.name": "task",
        "model.moe.balance.expert.scope": "global_batch",
        "model.moe.balance.router_z": None,
        "train.steps": 2,
        "train.eval_every": None,
    }
    workdir = tmp_path_factory.mktemp("by_task") / "run"
    train(tiny_config(**changes), workdir, progress=False)
    return workdir


def test_a_run_by_task_and_the_workdir_of_one(run, tmp_path):
    """The domain's loss is that of the mixture, the others' is not; other libraries take it."""
    before = load_run(run)
    tasks = before.config.model.moe.router.tasks
    assert tasks == tuple(before.corpus.domains)
    sent = evaluate(before.model, before.corpus, batch_size=4)
    to = tmp_path / "one"
    with pytest.raises(ValueError, match=r"^--moments=carried: they have no meaning"):
        workdirs.operate("extract_task", str(run), str(to), {"task": tasks[1]})
    assert not to.exists()
    workdirs.operate("extract_task", str(run), str(to), {"task": tasks[1]}, moments="fresh")
    after = load_run(to)
    found = evaluate(after.model, after.corpus, batch_size=4)
    for name in tasks:
        loss, wanted = (x["domains"][name]["loss"] for x in (found, sent))
        assert (abs(loss - wanted) < 1e-5) == (name == tasks[1]), name
    for by_layer in sent["load_by_domain"].values():
        assert all(np.count_nonzero(load_E) == 2 for load_E in by_layer)
    config = replace(read_config(to), **{"train.steps": 3, "train.schedule_steps": 2})
    assert train(config, to, progress=False).resumed_from == 2
    assert to_hf(str(to), str(tmp_path / "hf"), 3, "float32", 10**9).step == 3

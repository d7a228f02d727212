"""Quantising a run: the new workdir, its numbers against dequantised weights, and refusals."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import replace
from dsmoe_jax.hf.workdirs import to_hf
from dsmoe_jax.model import size
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.model.generation import generate
from dsmoe_jax.nn.quantisation import quantise, scale_name
from dsmoe_jax.runs.loading import load_writer
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.surgery import OPERATIONS, workdirs
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.start import check_start_from
from tests.tools.tiny import tiny

DEFAULTS = {name: option.default for name, option in OPERATIONS["quantise"].options.items()}


@pytest.fixture(scope="module")
def made(finished_run, tmp_path_factory):
    to = tmp_path_factory.mktemp("quantised") / "run"
    run = str(finished_run[0])
    return run, str(to), workdirs.operate("quantise", run, str(to), DEFAULTS).outcome


def arrays(model):
    """By the names of their path."""
    _, state = nnx.split(model)
    return {
        tuple(str(k.key) for k in path if hasattr(k, "key")): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(state)
    }


def test_the_checkpoint_is_the_quantised_model(made):
    run, to, outcome = made
    before, after = (arrays(load_writer(place).model) for place in (run, to))
    off = whole = 0.0
    for path, x in before.items():
        name = path[-1]
        if name.rpartition("_")[0] not in ("gate", "up", "down"):
            np.testing.assert_array_equal(after.pop(path), x)
            continue
        wanted = quantise(x)
        values, scale = after.pop(path), after.pop((*path[:-1], scale_name(name)))
        assert values.dtype == np.int8
        np.testing.assert_array_equal(values, wanted.values)
        np.testing.assert_array_equal(scale, wanted.scale)
        off += np.square(values * scale[..., None] - x, dtype=np.float64).sum()
        whole += np.square(x, dtype=np.float64).sum()
    assert not after
    assert outcome.report["error"] == pytest.approx((off / whole) ** 0.5, rel=1e-5)
    assert 0.002 < outcome.report["error"] < 0.01


def test_the_history_says_so(made):
    _, to, outcome = made
    (entry,) = workdirs.history(Path(to))
    assert entry["operation"] == "quantise"
    assert entry["moments"] == "none"
    assert entry["options"] == DEFAULTS
    assert entry["report"] == json.loads(json.dumps(outcome.report))
    assert read_config(to).model.moe.quantised.bits == 8


def test_text_is_that_of_dequantised_weights(made):
    run, to, _ = made
    writer = load_writer(to)
    found = arrays(writer.model)
    plain = load_writer(run)
    graph, state = nnx.split(plain.model)

    def dequantised(path, x):
        keys = tuple(str(k.key) for k in path if hasattr(k, "key"))
        scale = found.get((*keys[:-1], scale_name(keys[-1])))
        return x if scale is None else found[keys] * scale[..., None]

    reference = nnx.merge(graph, jax.tree.map_with_path(dequantised, state))
    prompts = [[writer.tokenizer.eos_id, *writer.tokenizer.encode("def main(")]]
    texts = [generate(model, prompts, 12).tokens_BG for model in (writer.model, reference)]
    np.testing.assert_array_equal(*texts)


FORMS = [
    {},
    {"n_shared_experts": 0},
    {"expert.name": "gpt_oss", "n_shared_experts": 2},
    {"n_routed_experts": 0, "num_experts_per_tok": 0, "balance": {}},
]


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bytes_are_those_of_the_arrays(form, quantised):
    changes = {f"model.moe.{key}": value for key, value in form.items()}
    if quantised:
        changes["model.moe.quantised.activations"] = True
    model = tiny(**changes).model
    shapes = model_shapes(model)
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert size.weight_bytes(model).total == found
    plain = size.count_parameters(tiny(**{f"model.moe.{k}": v for k, v in form.items()}).model)
    assert size.count_parameters(model) == plain


def test_16_bit_gates(made):
    run, _, _ = made
    quantising = OPERATIONS["quantise"].run
    config = read_config(run)
    subject = workdirs.Subject(config, _zeros(config))
    router = quantising(subject, {**DEFAULTS, "gates": "bfloat16"}).config.model.moe.router
    assert (router.logits_dtype, router.gates_dtype) == ("bfloat16", "bfloat16")
    for wrong, message in (
        ({"bits": 9}, r"^--bits=9: must be 2 to 8$"),
        ({"gates": "int8"}, r"^--gates='int8': must be one of \('float32', 'bfloat16'\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            quantising(subject, {**DEFAULTS, **wrong})


def _zeros(config):
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), model_shapes(config.model))


def test_what_a_quantised_model_cannot_do(made, tmp_path):
    """One line each, and nothing is written."""
    run, to, _ = made
    config = read_config(to)
    new = str(tmp_path / "new")
    own = {name: option.default for name, option in OPERATIONS["prune"].options.items()}
    began = replace(read_config(run), **{"train.start_from": to})
    for refused, message in (
        (lambda: train(config, new), r"^model.moe.quantised=.*whole numbers have no gradient;"),
        (lambda: check_start_from(began), r"^train.start_from=.*must be the run that it was made"),
        (lambda: to_hf(to, new, None, "float32", 10**9), r"^--from=.*are not quantised; must be"),
        (lambda: workdirs.operate("quantise", to, new, DEFAULTS), r"^--from=.*are quantised;"),
        (lambda: workdirs.operate("prune", to, new, own), r"^--from=.*are quantised; must be"),
        (
            lambda: workdirs.operate("quantise", run, new, DEFAULTS, moments="fresh"),
            r"^--moments=fresh: quantise makes no model to train; must be none$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert [*tmp_path.iterdir()] == []

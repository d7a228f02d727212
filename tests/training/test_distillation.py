"""A dense student of a mixture: parts of the loss by formula, runs, and what is refused.

Shapes: B sequences, S positions, D hidden, V vocabulary.
"""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.model.size import count_parameters
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.planning import planner
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training import teacher
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.micro_batches import BatchGradient
from dsmoe_jax.training.rows import shown
from dsmoe_jax.training.start import init_state, state_shapes
from tests.tools.tiny import batch, tiny
from tests.tools.trees import REORDERED, assert_all_below, relative_errors

V, D = 64, 32
SIZES = {
    "model.vocab_size": V,
    "model.num_hidden_layers": 1,
    "model.initializer_range": 0.3,
    "data.sequence_length": 12,
    "data.tokenizer_vocab_size": V,
}
DENSE = {
    "model.moe.balance.expert": None,
    "model.moe.balance.router_z": None,
    "model.moe.n_routed_experts": 0,
    "model.moe.num_experts_per_tok": 0,
    "model.moe.n_shared_experts": 1,
}
SECTION = {
    "train.distillation.teacher": "DIR",
    "train.distillation.factor": 0.3,
    "train.distillation.temperature": 2.0,
    "train.distillation.hidden_factor": 0.1,
}
NOISY = {**SIZES, "model.moe.router.name": "noisy_topk"}
# A teacher that is random in training and drops in evaluation; as a teacher it does neither.
MIXTURE = {**NOISY, "model.moe.evaluation_drop.capacity_factor": 0.5}


def student(**overrides):
    return tiny(**{**SIZES, **DENSE, **SECTION, **overrides})


@functools.cache
def states():
    """Arrays of the student and of the teacher."""
    of_teacher = init_state(tiny(**MIXTURE, **{"train.seed": 1}))
    return init_state(student()), ModelState(of_teacher.params, of_teacher.other)


@functools.cache
def compiled(micro_batches=1, block_tokens=None):
    config = student(
        **{"train.accumulation_steps": micro_batches, "model.head_block_tokens": block_tokens}
    )
    return jax.jit(BatchGradient(config, jnp.ones(V), tiny(**MIXTURE).model))


def gradients(*settings):
    mine, of_teacher = states()
    arguments = mine.params, mine.other, batch(student()), jax.random.key(0), {}, None
    return jax.device_get(compiled(*settings)(*arguments, of_teacher))


def by_formula(params):
    """The parts by plain sums over the predicted tokens of the batch, each model by itself."""
    mine, of_teacher = states()
    arrays = batch(student())
    inputs = ModelInputs.of_batch(arrays)
    model = nnx.merge(abstract_model(student().model), params, mine.other)
    frozen = nnx.merge(abstract_model(tiny(**NOISY).model), *of_teacher)
    mask_BS = arrays["loss_mask_BS"]
    hidden_BSD, teacher_BSD = (m.hidden(inputs)[0] for m in (model, frozen))
    log_BSV = jax.nn.log_softmax(model.logits(hidden_BSD))
    targets_BS1 = arrays["targets_BS"][..., None]
    text_BS = -jnp.take_along_axis(log_BSV, targets_BS1, axis=-1)[..., 0]
    soft_BSV, of_teacher_BSV = (
        jnp.exp(m.logits(x) / 2.0) / jnp.exp(m.logits(x) / 2.0).sum(axis=-1, keepdims=True)
        for m, x in ((model, hidden_BSD), (frozen, teacher_BSD))
    )
    kl_BS = (of_teacher_BSV * jnp.log(of_teacher_BSV / soft_BSV)).sum(axis=-1)
    squared_BS = ((hidden_BSD - teacher_BSD) ** 2).sum(axis=-1) / D
    agreed_BS = soft_BSV.argmax(axis=-1) == of_teacher_BSV.argmax(axis=-1)
    mean = [(x * mask_BS).sum() / mask_BS.sum() for x in (text_BS, kl_BS, squared_BS, agreed_BS)]
    parts = {
        "cross_entropy": 0.7 * mean[0],
        "distillation": 0.3 * 4 * mean[1],
        "hidden_states": 0.1 * mean[2],
    }
    return sum(parts.values()), (parts, mean[3])


def test_parts_and_gradient_by_formula():
    """Packed documents, with padding."""
    found = gradients()
    derive = jax.jit(jax.value_and_grad(by_formula, has_aux=True))
    (total, (parts, agreement)), wanted = derive(states()[0].params)
    assert set(found.totals.parts) == set(parts)
    for name, part in parts.items():
        np.testing.assert_allclose(found.totals.parts[name], part, rtol=REORDERED)
    np.testing.assert_allclose(found.totals.total_loss, total, rtol=REORDERED)
    sums = found.totals.distilled
    np.testing.assert_allclose(sums.agreed / found.totals.sums.tokens, agreement, rtol=REORDERED)
    assert_all_below(relative_errors(found.params, wanted), 3 * REORDERED)


def test_micro_batches_and_blocks_of_tokens_change_nothing():
    whole, cut = gradients(), gradients(2, 7)
    assert_all_below(relative_errors(cut.params, whole.params), REORDERED)
    chex.assert_trees_all_close(cut.totals, whole.totals, rtol=1e-5, atol=1e-6)


def test_a_teacher_as_its_own_student():
    """No divergence, and every best token is the same."""
    config = student(**{"train.distillation.factor": 1.0})
    mine, _ = states()
    gradient = jax.jit(BatchGradient(config, jnp.ones(V), config.model))
    arguments = mine.params, mine.other, batch(config), jax.random.key(0), {}, None
    totals, grads, _ = gradient(*arguments, ModelState(mine.params, mine.other))
    assert float(totals.parts["distillation"]) == 0 == float(totals.parts["hidden_states"])
    assert float(totals.distilled.agreed) == float(totals.sums.tokens)
    assert all(np.abs(x).max() < 1e-6 for x in jax.tree.leaves(grads))


@pytest.mark.eight_devices
def test_on_a_mesh():
    """The teacher's experts are split over devices in a run whose student has none."""
    mine, of_teacher = jax.device_get(states())
    config = student()
    arguments = mine.params, mine.other, batch(config), jax.random.key(0), {}, None, of_teacher
    gradient = BatchGradient(config, jnp.ones(V), tiny(**MIXTURE).model)

    @jax.jit
    def totals(*arguments):  # a gradient over a mesh takes long to compile, and is that of the text
        return gradient(*arguments).totals

    alone = totals(*arguments)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
        placed = jax.device_put(of_teacher, sharding.shardings(of_teacher))
        params = jax.device_put(mine.params, sharding.shardings(mine.params))
        found = totals(params, *arguments[1:-1], placed)
    chex.assert_trees_all_close(found, alone, rtol=1e-5, atol=1e-6)


RUN = {
    "model.num_hidden_layers": 1,
    "train.schedule_steps": 8,
    "train.steps": 8,
    "train.checkpoint_every": 4,
    "train.eval_every": None,
    "train.eval_batches": 1,
}


@pytest.fixture(scope="module")
def mixture(tiny_config, tmp_path_factory):
    """A finished run of a mixture."""
    workdir = tmp_path_factory.mktemp("runs") / "mixture"
    train(tiny_config(**{**RUN, "train.steps": 2}), workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def taught(tiny_config, mixture):
    """`taught(**{"train.steps": 4})`: the config of a student of it."""

    def make(**overrides):
        section = {"train.distillation.teacher": str(mixture)}
        return tiny_config(**{**RUN, **DENSE, **section, **overrides})

    return make


def test_four_steps_and_four_are_eight(taught, mixture, tmp_path, monkeypatch):
    """Bit for bit, with the same teacher; checkpoints say which it was, and do not hold it."""
    train(taught(), tmp_path / "whole", progress=False)
    train(taught(**{"train.steps": 4}), tmp_path / "run", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "digests", lambda state: [0])  # of other arrays in its place
        message = r"^train\.distillation\.teacher='.*': is another model than the run had \(\{'s"
        with pytest.raises(ValueError, match=message):
            train(taught(), tmp_path / "run", progress=False)
    assert train(taught(), tmp_path / "run", progress=False).resumed_from == 4
    rows = [[r for r in read_rows(tmp_path / name) if "loss" in r] for name in ("run", "whole")]
    keys = ("step", "loss", "total_loss", "grad_norm", "distillation", "teacher_agreement")
    assert [[row[k] for k in keys] for row in rows[0]] == [[r[k] for k in keys] for r in rows[1]]
    for row in rows[0]:
        np.testing.assert_allclose(
            row["total_loss"], 0.75 * row["loss"] + row["distillation"], rtol=1e-5
        )
    assert shown(rows[0])["distillation"] == f"{rows[0][-1]['distillation']:.4f}"
    saved = Checkpoints(tmp_path / "run/checkpoints", keep=None)
    extra = saved.restore(8, {}).extra
    saved.close()
    assert extra["teacher"]["step"] == 2
    assert not (tmp_path / "run/checkpoints/8/teacher").exists()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"]["distillation"]["teacher"] == str(mixture)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.distillation.teacher": "/none"}, r"teacher='/none': holds no run"),
        ({"model.vocab_size": 513}, r"teacher='.*': its model\.vocab_size is 512, here it is 513"),
        ({"model.hidden_size": 16, "train.distillation.hidden_factor": 1.0},
         r"hidden_factor=1\.0: must be None: the teacher's .* is 32, the student's 16"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused(taught, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=rf"^train\.distillation\.{message}") as caught:
        train(taught(**overrides), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_finished_or_damaged_is_refused(taught, mixture, tmp_path):
    moved = shutil.copytree(mixture, tmp_path / "teacher")
    config = json.loads((moved / "config.json").read_text())
    config["train"]["steps"] = 5
    (moved / "config.json").write_text(json.dumps(config))
    of_moved = taught(**{"train.distillation.teacher": str(moved)})
    with pytest.raises(ValueError, match=r"teacher='.*': is at step 2 of 5; must be trained"):
        train(of_moved, tmp_path / "run", progress=False)
    config["train"]["steps"] = 2
    (moved / "config.json").write_text(json.dumps(config))
    file = max((moved / "checkpoints/2/model").rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^/.*checkpoints/2: the checkpoint cannot be read"):
        train(of_moved, tmp_path / "run", progress=False)
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(ValueError, match=r"teacher='.*': the run has no checkpoint yet"):
        train(of_moved, tmp_path / "run", progress=False)


def test_another_tokenizer_is_refused(taught, tmp_path, monkeypatch):
    def refuse(corpus, fingerprint, key):
        raise ValueError(f"{key}: its tokenizer is not that of the corpus")

    monkeypatch.setattr(teacher, "check_same_tokenizer", refuse)
    with pytest.raises(ValueError, match=r"^train\.distillation\.teacher=.*: its tokenizer is not"):
        train(taught(), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"teacher=None: must be the workdir of a trained model"),
        ({"teacher": "runs/a", "factor": 1.5}, r"factor=1\.5: must be at most 1"),
        ({"teacher": "runs/a", "factor": 0.0}, r"factor=0\.0: must be > 0"),
        ({"teacher": "runs/a", "temperature": 0.0}, r"temperature=0\.0: must be > 0"),
        ({"teacher": "runs/a", "hidden_factor": -1.0}, r"hidden_factor=-1\.0: must be > 0"),
    ],
)
def test_bad_sections(changes, message):
    with pytest.raises(ValueError, match=rf"^train\.distillation\.{message}"):
        tiny(**{f"train.distillation.{key}": value for key, value in changes.items()})


def test_stages_cannot_change_the_teacher():
    with pytest.raises(ValueError, match=r"factor cannot change during a run"):
        student(
            **{
                "train.stages.share": (0.5, 0.5),
                "train.stages.train.distillation.factor": (0.5, 1.0),
            }
        )


def test_the_plan_has_the_teachers_parameters(taught):
    model = teacher.teacher_model(taught())
    assert model is not None
    state = state_shapes(taught())
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    with_teacher, without = (
        planner.estimate(taught(), state, sizes, 1, each) for each in (model, None)
    )
    n = count_parameters(model).total
    np.testing.assert_allclose(with_teacher.memory["teacher"], 4 * n / 1e9)
    np.testing.assert_allclose(with_teacher.used - without.used, 4 * n / 1e9)

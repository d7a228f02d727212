"""The teacher of a run that is distilled: a trained model beside the one that is trained.

It is loaded anew whenever the run begins or goes on.  Checkpoints of the run do not hold it; they
say which model it was, and another one is refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import jax

from dsmoe_jax.config import Config, ModelConfig, stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import check_same_tokenizer
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.nn import attention
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import loading, routing_records
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.digests import digests
from dsmoe_jax.storage.places import place_of

TEACHER = "train.distillation.teacher"  # key of the config


class Teacher(NamedTuple):
    """A frozen model.

    Attributes:
      model: its config, in the stage of its checkpoint.
      state: its arrays, float32, in their shards on the ambient mesh.
      identity: step of the checkpoint and digest of the arrays, for the run's checkpoints (JSON).
    """

    model: ModelConfig
    state: ModelState
    identity: dict[str, Any]


def teacher_model(config: Config) -> ModelConfig | None:
    """The model of a run's teacher; None if it has none.  Reads its config, loads nothing.

    Raises:
      ValueError: if the teacher is no trained model, is still being trained, or does not fit.
    """
    section = config.train.distillation
    if section is None:
        return None
    key = f"{TEACHER}={section.teacher!r}"
    workdir = place_of(TEACHER, str(section.teacher))
    there = workdirs.read_config(workdir, key)
    with loading.saved_checkpoints(workdir, key) as checkpoints:
        step = checkpoints.steps()[-1]
    steps = there.train.steps
    # What was converted, or made by `surgery`, has no rows: it is as it was meant to be.
    training = (workdir / workdirs.METRICS).exists() and step < steps
    if training:
        raise ValueError(f"{key}: is at step {step} of {steps}; must be trained to its end first")
    teacher = stage_of(there, step).config
    _check_fits(config, teacher, key)
    return teacher.model


def _check_fits(config: Config, teacher: Config, key: str) -> None:
    here, there = config.model, teacher.model
    if here.vocab_size != there.vocab_size:
        raise ValueError(
            f"{key}: its model.vocab_size is {there.vocab_size}, here it is {here.vocab_size}; must"
            " be the same"
        )
    section = config.train.distillation
    assert section is not None
    require(
        section.hidden_factor is None or here.hidden_size == there.hidden_size,
        "train.distillation.hidden_factor",
        section.hidden_factor,
        f"must be None: the teacher's model.hidden_size is {there.hidden_size}, the student's"
        f" {here.hidden_size}",
    )
    if routing_records.needs(teacher) == "routing":
        name = there.moe.router.name
        raise ValueError(f"{key}: its router {name!r} only replays; must choose by itself")


def check_teacher_on_mesh(config: Config) -> None:
    """Refuses a teacher that the ambient mesh does not divide, or that has no kernel there.

    Raises:
      ValueError: as `sharding.check` and `attention.kernel_of`, and as `teacher_model`.
    """
    teacher = teacher_model(config)
    if teacher is None:
        return
    try:
        sharding.check(model_shapes(teacher), jax.sharding.get_mesh().shape)
        length = config.data.sequence_length
        attention.kernel_of(teacher.attention, length, compute_dtype(teacher))
    except ValueError as error:
        name = config.train.distillation and config.train.distillation.teacher
        raise ValueError(f"{TEACHER}={name!r}: {error}") from None


def load_teacher(config: Config, corpus: Corpus) -> Teacher | None:
    """Loads the newest checkpoint of a run's teacher; None if it has none.

    Args:
      config: of the run.
      corpus: that it is trained on.

    Raises:
      ValueError: if the checkpoint is damaged or of another tokenizer, and as `teacher_model`.
    """
    model = teacher_model(config)
    if model is None:
        return None
    section = config.train.distillation
    assert section is not None
    key = f"{TEACHER}={section.teacher!r}"
    workdir = place_of(TEACHER, str(section.teacher))
    loaded = loading.load_model_state(workdir, model_shapes(model), key=key)
    check_same_tokenizer(corpus, loaded.extra["tokenizer"], key)
    bits = json.dumps(digests(loaded.state)).encode()
    identity = {"step": loaded.step, "digest": hashlib.sha256(bits).hexdigest()[:16]}
    return Teacher(model, loaded.state, identity)


def check_same_teacher(config: Config, teacher: Teacher | None, saved: Any) -> None:
    """Refuses to go on with another teacher than the run had.

    Args:
      config: of the run.
      teacher: that it would have.
      saved: the identity in its checkpoint; None without a teacher.

    Raises:
      ValueError: naming both.
    """
    now = None if teacher is None else teacher.identity
    if now != saved:
        name = config.train.distillation and config.train.distillation.teacher
        raise ValueError(
            f"{TEACHER}={name!r}: is another model than the run had ({now}, then {saved}); bring"
            " the old one back or start in another workdir"
        )

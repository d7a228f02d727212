"""A probe of a mixture whose router chooses by task: the dense model of each task beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsmoe_jax.config import stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.tasks import numbers_of
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import Run
from dsmoe_jax.runs.summaries import bits_per_byte
from dsmoe_jax.study.probes import held_out
from dsmoe_jax.surgery import Subject, one_task

Summary = Mapping[str, Any]  # of a domain: loss, bits_per_byte, tokens, bytes


def models_of_tasks(run: Run, intervention: Intervention) -> dict[str, Any]:
    """Each domain's loss by the dense model of its task, `surgery.one_task`.

    Args:
      run: a finished run of a model whose router chooses by task.
      intervention: none; an extracted model has no routed experts.

    Returns:
      `loss`, `bits_per_byte`, `tokens`, `bytes` and `domains` of the held-out text, every domain
      judged by the model of its own task; and `inside` with `task_gap` (how far a domain's loss is
      from that of the mixture, by domain) and `task_rise` (how far the loss on all domains of other
      tasks is above that of the mixture, by task, nats per token).
    """
    plain = intervention == interventions.NONE
    require(plain, "intervention", intervention, "the models of tasks have no routed experts")
    mixture = held_out(run, intervention)["domains"]
    tasks = run.model.config.moe.router.tasks
    task_of = dict(zip(run.corpus.domains, numbers_of(run.corpus.domains, tasks), strict=True))
    own: dict[str, Summary] = {}
    rises = []
    measured = _measured(run, sorted({task_of[domain] for domain in mixture}))
    for task, domains in measured.items():
        others = [domain for domain in domains if task_of[domain] != task]
        if others:  # a short look may have text of one task alone
            rises.append(_loss(domains, others) - _loss(mixture, others))
        own |= {domain: domains[domain] for domain in domains if task_of[domain] == task}
    gaps = [abs(own[domain]["loss"] - mixture[domain]["loss"]) for domain in own]
    total = {key: sum(one[key] for one in own.values()) for key in ("tokens", "bytes")}
    loss = _loss(own, [*own])
    return {
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss * total["tokens"], total["bytes"]),
        **total,
        "domains": own,
        "inside": {"task_gap": gaps, "task_rise": rises},
    }


def _measured(run: Run, tasks: Sequence[int]) -> dict[int, dict[str, Summary]]:
    """The results by domain of the dense model of each task, on the text of the run's own."""
    config = stage_of(run.config, run.step).config
    train = config.train
    graph = abstract_model(one_task.dense_config(config).model)
    micro_batch = train.global_batch_size // train.accumulation_steps
    text = HeldOut(graph, run.corpus, micro_batch, train.eval_batches)  # one program for all
    _, params, other = nnx.split(run.model, nnx.Param, ...)
    subject = Subject(config, ModelState(params, other))
    found = {}
    for task in tasks:
        name = config.model.moe.router.tasks[task]
        dense = one_task.extract_task(subject, {"task": name}).model
        found[task] = text.measure(jax.tree.map(np.asarray, dense.params), dense.other)["domains"]
    return found


def _loss(domains: Mapping[str, Summary], names: Sequence[str]) -> float:
    """Nats per token of some domains together."""
    tokens = [domains[name]["tokens"] for name in names]
    losses = [domains[name]["loss"] for name in names]
    return float(np.average(losses, weights=tokens))

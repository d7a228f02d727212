"""Probes of a model with fewer experts: pruned, merged, or the part that a domain needs.

Which experts those are is chosen on training text, the first sequences of its shards, in which all
domains are interleaved; the model is judged on the held-out text of its run.  It is not trained
afterwards.

Shapes: L MoE layers, E routed experts before, N afterwards.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsmoe_jax.analysis import routed_text
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.packing import decode_record, encode_record, read_records
from dsmoe_jax.data.pipeline import Batch, make_batch
from dsmoe_jax.model import size
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.digests import digests
from dsmoe_jax.runs.loading import Run
from dsmoe_jax.study.probes import held_out
from dsmoe_jax.surgery import merging, pruning
from dsmoe_jax.surgery.evidence import BATCH, Evidence
from dsmoe_jax.surgery.likeness import LIKENESS
from dsmoe_jax.surgery.pruning import WAYS, Ranked
from dsmoe_jax.surgery.types import Outcome, Subject

USE_BATCHES = 16  # of training text on which the use of the experts is counted
RANDOM = "random"  # which experts stay: what the ways of pruning must beat


def pruned(
    run: Run, intervention: Intervention, *, by: str, keep: int | None = None
) -> dict[str, Any]:
    """`probes.held_out` of a model without some experts, and below `inside` what is left.

    Of the experts and of all parameters, in %: experts_left, parameters_left.  most_alike: the
    largest likeness of two experts of the whole model, if they go by likeness.

    Args:
      run: a finished run, of a model with routed experts.
      intervention: none.
      by: a name in `surgery.pruning.WAYS`, or `RANDOM`.
      keep: routed experts that stay in each layer; None: as many as the threshold of likeness says.

    Raises:
      ValueError: for an intervention, and for numbers that do not fit the model.
    """
    subject = _subject(run, intervention)
    outcome = pruning.cut(subject, _ranked(run, subject, by), keep, f"by={by}")
    found = _judged(run, outcome)
    most_alike = outcome.report.get("most_alike")
    if most_alike is not None:
        found["inside"]["most_alike"] = max(most_alike)
    return found


def merged(run: Run, intervention: Intervention, *, by: str, keep: int) -> dict[str, Any]:
    """`pruned` of a model whose alike experts became one, the mean by use of their weights.

    Args:
      run, intervention, keep: see `pruned`.
      by: a name in `surgery.likeness.LIKENESS`.

    Raises:
      ValueError: as `pruned` does.
    """
    subject = _subject(run, intervention)
    text = training_text(run.corpus, LIKENESS[by].batches)
    found = Evidence(text, _use(run)[0])
    return _judged(run, merging.merged_by(subject, by, found, keep=keep))


def extracted(
    run: Run, intervention: Intervention, *, domains: str, share: float, gates: bool = True
) -> dict[str, Any]:
    """`pruned` of the sub-model with the experts that a share of a domain's use goes to.

    Below `inside` also domains, the names of those that are the domain, and general: the losses by
    domain, as in `domains`, of a sub-model with as many experts, those that all text uses most.

    Args:
      run, intervention: see `pruned`.
      domains: those whose names begin so are the domain.
      share: of its use in each layer, whose experts stay.
      gates: the use is the sum of gates; else it is the number of assignments.

    Raises:
      ValueError: for domains that are not there or all there are, and as `pruned` does.
    """
    subject = _subject(run, intervention)
    own = [name for name in run.corpus.domains if name.startswith(domains)]
    want = f"must begin the names of some of {', '.join(run.corpus.domains)}"
    require(0 < len(own) < len(run.corpus.domains), "domains", domains, want)
    place = 1 if gates else 0
    outcome = pruning.extracted(subject, _use(run, own)[place], share=share)
    keep = outcome.config.model.moe.n_routed_experts
    general = pruning.extracted(subject, _use(run)[place], keep=keep)
    found = _judged(run, outcome)
    found["inside"] |= {"domains": own, "general": _judged(run, general)["domains"]}
    return found


def training_text(
    corpus: Corpus, n_batches: int, domains: Sequence[str] | None = None
) -> list[Batch] | None:
    """The first batches of the training text, of all domains or of some.

    Args:
      corpus: of the run.
      n_batches: of `BATCH` sequences at most; 0: none, and the text is None.
      domains: names.

    Raises:
      ValueError: if there is no such text.
    """
    if not n_batches:
        return None
    wanted = {i for i, name in enumerate(corpus.domains) if domains is None or name in domains}
    records = read_records(corpus.shards("train"))
    chosen = (record for record in records if decode_record(record)[0] in wanted)
    tokenizer = corpus.tokenizer
    nothing = encode_record(0, np.array([tokenizer.pad_id], np.int32))
    found = []
    for _ in range(n_batches):
        rows = list(itertools.islice(chosen, BATCH))
        if not rows:
            break
        whole = [*rows, *[nothing] * (BATCH - len(rows))]
        found.append(make_batch(whole, corpus.sequence_length, tokenizer.eos_id, tokenizer.pad_id))
    require(bool(found), "domains", domains, "have no training text")
    return found


def _subject(run: Run, intervention: Intervention) -> Subject:
    """The model as surgery takes it."""
    plain = intervention == interventions.NONE
    require(plain, "intervention", intervention, "surgery is on the model as it was trained")
    _, params, other = nnx.split(run.model, nnx.Param, ...)
    return Subject(stage_of(run.config, run.step).config, ModelState(params, other))


def _use(run: Run, domains: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Assignments to each expert on training text, and the sum of its gates, (L, E)."""
    text = training_text(run.corpus, USE_BATCHES, domains)
    assert text is not None, "some batches"
    return routed_text.use(run.model, text)


_RANKED: dict[tuple, Ranked] = {}  # the last one: several probes ask for different numbers of it


def _ranked(run: Run, subject: Subject, by: str) -> Ranked:
    """The experts by how much they would be missed."""
    key = (by, subject.config, *digests(subject.model))
    if key not in _RANKED:
        _RANKED.clear()
        _RANKED[key] = RANKINGS[by](run, subject)
    return _RANKED[key]


def _by(way: str, run: Run, subject: Subject) -> Ranked:
    """The ranking of a way of pruning."""
    text = training_text(run.corpus, WAYS[way].batches)
    use_LE = _use(run)[0] if WAYS[way].takes_loads else None
    return WAYS[way].rank(subject, Evidence(text, use_LE), pruning.THRESHOLD)


def _at_random(run: Run, subject: Subject) -> Ranked:
    """A random order, another one for each seed of the run."""
    moe = subject.config.model.moe
    rng = np.random.default_rng(run.config.train.seed)
    n_layers = len(subject.config.model.moe_layers)
    value_LE = rng.permuted(np.tile(np.arange(moe.n_routed_experts), (n_layers, 1)), axis=1)
    return pruning.by_value(subject, value_LE, list(value_LE))


RANKINGS: dict[str, Callable[[Run, Subject], Ranked]] = {
    **{way: functools.partial(_by, way) for way in WAYS},
    RANDOM: _at_random,
}


def _judged(run: Run, outcome: Outcome) -> dict[str, Any]:
    """The changed model on the held-out text, and how much of it is left."""
    model = nnx.merge(abstract_model(outcome.config.model), *jax.device_put(outcome.model))
    found = held_out(run._replace(model=model), interventions.NONE)
    before = run.model.config
    after = outcome.config.model
    parameters = [size.count_parameters(config).total for config in (after, before)]
    found["inside"] = {
        "experts_left": 100 * after.moe.n_routed_experts / before.moe.n_routed_experts,
        "parameters_left": 100 * parameters[0] / parameters[1],
    }
    return found

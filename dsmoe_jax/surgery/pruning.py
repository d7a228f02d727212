"""Pruning: some experts of each layer stay, the others go, with their router rows and biases.

    likeness   of two experts that are alike one goes: the less used one, or without loads the later
    use        experts that a text does not need go, by its recorded loads
    loss       experts go without which the loss on held-out text rises least, each tried alone
    extraction the experts that have a share of a domain's use stay: a model for that domain

A new way to prune is a function and a line in `WAYS`.

All layers of a model have equally many experts.  So all keep as many as the layer that needs most;
a layer that needs fewer keeps the best of those that it could do without.  Groups of group-limited
routing stay equal in the same way.

Pruning of experts that no token chooses changes nothing where scores and gates depend on the
experts chosen alone: sigmoid and sqrtsoftplus scores, fixed tables, and a softmax whose gates are
normalised (`norm_topk_prob`), without a loss-free bias or limits to groups.  A softmax is over all
experts: without the pruned ones the scores of the others grow by the share that those had, and with
them V1's gates; a bias that is added to larger scores decides less.

Shapes: L MoE layers, E routed experts before, N experts after, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from dsmoe_jax.analysis import leaving_out
from dsmoe_jax.analysis.leaving_out import LossWithout
from dsmoe_jax.config.checks import require
from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.runs import loads
from dsmoe_jax.surgery import evidence, fewer, likeness, permutation
from dsmoe_jax.surgery.evidence import LOADS, Evidence
from dsmoe_jax.surgery.likeness import LIKENESS
from dsmoe_jax.surgery.types import Option, Outcome, Subject
from dsmoe_jax.training import freezing

THRESHOLD = 0.85  # likeness above which an expert is one too many
SHARE = 0.9  # of a domain's use that an extracted model keeps
LOSS_BATCHES = 4  # of held-out text on which experts are left out, one pass for each of a model


class Ranking(NamedTuple):
    """The experts of a layer or of a group of it, the one that should stay longest first.

    Attributes:
      ids: of the experts.
      needed: how many of them should stay.
    """

    ids: np.ndarray
    needed: int


class Ranked(NamedTuple):
    """The experts of a model by how much they would be missed.

    Attributes:
      layers: the rankings of the parts of every MoE layer.
      alike: likeness of each pair of every layer; in a table the tokens of an expert that goes get
        the one that is most like it.
      report: of what the ranking is by.
      text: the same for the eye.
    """

    layers: list[list[Ranking]]
    alike: list[np.ndarray]
    report: Mapping[str, Any] = MappingProxyType({})
    text: str = ""


def _by_likeness(subject: Subject, found: Evidence, threshold: float, *, by: str) -> Ranked:
    alike = LIKENESS[by].run(subject, found.text)
    use = [None] * len(alike) if found.use_LE is None else found.use_LE
    layers = [
        [ranked(alike_EE, use_E, ids, threshold) for ids in fewer.parts(subject.config.model)]
        for alike_EE, use_E in zip(alike, use, strict=True)
    ]
    largest = [_most_alike(alike_EE) for alike_EE in alike]
    numbers = ", ".join("-" if x is None else f"{x:.3f}" for x in largest)
    text = f"likeness of the most alike two, by layer: {numbers}"
    return Ranked(layers, alike, {"most_alike": largest}, text)


def _by_use(subject: Subject, found: Evidence, threshold: float) -> Ranked:
    del threshold
    assert found.use_LE is not None, "see `Way.needs_loads`"
    wanted = [np.flatnonzero(use_E) for use_E in found.use_LE]
    return by_value(subject, found.use_LE, wanted)


def _by_loss(subject: Subject, found: Evidence, threshold: float) -> Ranked:
    del threshold
    assert found.text is not None, "see `Way.batches`"
    moe = subject.config.model.moe
    want = "a token has no next best expert; no expert can be left out by itself"
    name = moe.router.name
    require(get_router(moe)[0].leaves_out, "model.moe.router.name", name, want)
    loss = LossWithout(nnx.merge(abstract_model(subject.config.model), *subject.model))
    n_layers, e = loss.shape
    alone = [list(np.arange(e)[:, None])] * n_layers
    rises_LE = leaving_out.rises(loss, found.text, alone)
    numbers = ", ".join(f"{rises_E.min():.4f} to {rises_E.max():.4f}" for rises_E in rises_LE)
    text = f"rise of the loss without one expert, nats per token, by layer: {numbers}"
    order = by_value(subject, rises_LE, [np.arange(e)] * n_layers)
    return order._replace(report={"rises": rises_LE.tolist()}, text=text)


class Way(NamedTuple):
    """A way to rank experts in the registry.

    Attributes:
      rank: `(subject, evidence, threshold) -> Ranked`.
      batches: of held-out text that it takes; 0: none.
      takes_loads: whether recorded loads say something.
      needs_loads: whether nothing can be said without.
      has_threshold: a likeness, above which experts go.
      needs_keep: whether it cannot say how many should stay.
    """

    rank: Callable[[Subject, Evidence, float], Ranked]
    batches: int = 0
    takes_loads: bool = True
    needs_loads: bool = False
    has_threshold: bool = False
    needs_keep: bool = False


WAYS: dict[str, Way] = {
    **{
        name: Way(functools.partial(_by_likeness, by=name), measure.batches, has_threshold=True)
        for name, measure in LIKENESS.items()
    },
    "use": Way(_by_use, needs_loads=True),
    "loss": Way(_by_loss, LOSS_BATCHES, takes_loads=False, needs_keep=True),
}
TEXTUAL = ", ".join(name for name, way in WAYS.items() if way.batches)

KEEP = Option(int, "Experts that stay in each layer, instead of a threshold or share.")
OPTIONS = {
    "by": Option(
        str,
        f"{', '.join(WAYS)}: what makes an expert one too many; weights, weights in the best order"
        " of hidden units, outputs on held-out text of the run, that --loads have no token for it,"
        " or that the loss on held-out text rises least without it.",
        "weights",
    ),
    "threshold": Option(
        float, f"Likeness above which one of two experts goes; {THRESHOLD} without --keep."
    ),
    "keep": KEEP,
    "loads": Option(str, f"Recorded loads: {LOADS}  Of two alike experts the less used one goes."),
    "text": evidence.text_option(TEXTUAL),
}
EXTRACTION_OPTIONS = {
    "loads": Option(str, f"Loads recorded on the domain's text: {LOADS}", needed=True),
    "by": Option(
        str,
        f"{', '.join(loads.KINDS)}: what a share is of; a metrics.jsonl has no gates.",
        loads.ASSIGNMENTS,
    ),
    "share": Option(
        float, f"Share of each layer's use whose experts stay; {SHARE} without --keep."
    ),
    "keep": KEEP,
}


def prune(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Leaves experts out that are like others, or that a text does not use or hardly misses.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for numbers that leave fewer experts than a token activates, or do not fit; for
        loads of another model.
    """
    permutation.check(subject.config.model)
    by = options["by"]
    keep = options["keep"]
    if by not in WAYS:
        raise ValueError(f"--by={by}: must be one of {', '.join(WAYS)}")
    way = WAYS[by]
    takes = {"threshold": way.has_threshold, "loads": way.takes_loads}
    for name, has_meaning in takes.items():
        if options[name] is not None and not has_meaning:
            raise ValueError(f"--{name}={options[name]}: has no meaning for --by={by}")
    if way.needs_loads and options["loads"] is None:
        raise ValueError(f"--loads: missing; --by={by} counts the tokens of each expert")
    if way.needs_keep and keep is None:
        raise ValueError(f"--keep: missing; --by={by} ranks experts, and has no threshold")
    if keep is not None:  # before a long search
        fewer.check_number(subject.config.model, keep, f"--keep={keep}")
    threshold = threshold_of(options)
    found = Evidence(
        evidence.text_of_run(subject, by, options["text"], way.batches),
        evidence.use_of(subject, options["loads"]),
    )
    why = f"--threshold={threshold}" if way.has_threshold else f"--by={by}"
    return cut(subject, way.rank(subject, found, threshold), keep, why)


def extract(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """The sub-model that a domain needs: in each layer the experts with a share of its use.

    Args:
      subject: the model.
      options: values of `EXTRACTION_OPTIONS`.

    Raises:
      ValueError: as `prune` does.
    """
    permutation.check(subject.config.model)
    by = options["by"]
    if by not in loads.KINDS:
        raise ValueError(f"--by={by}: must be one of {', '.join(loads.KINDS)}")
    share = options["share"]
    if share is not None and options["keep"] is not None:
        raise ValueError(f"--share={share}: --keep={options['keep']} says how many; name one")
    share = SHARE if share is None else share
    if not 0 < share <= 1:
        raise ValueError(f"--share={share}: must be above 0 and at most 1")
    use_LE = evidence.use_of(subject, options["loads"], by)
    assert use_LE is not None, "it is needed"
    try:
        return extracted(subject, use_LE, share=share, keep=options["keep"])
    except freezing.NoLoad as error:
        raise ValueError(f"--loads={options['loads']}: {error}") from error


def extracted(
    subject: Subject, use_LE: np.ndarray, *, share: float = SHARE, keep: int | None = None
) -> Outcome:
    """`extract` from a use that is there.

    Args:
      subject: the model.
      use_LE: of each expert by the domain.
      share: of each layer's use whose experts stay.
      keep: experts that stay in each layer instead, the most used ones.

    Raises:
      ValueError: for a layer without use, and as `prune` does.
    """
    wanted = freezing.most_used(use_LE, share)
    outcome = cut(subject, by_value(subject, use_LE, wanted), keep, f"--share={share}")
    ids_LN = outcome.report["experts"]
    held = [
        float(use_E[ids].sum() / use_E.sum()) for use_E, ids in zip(use_LE, ids_LN, strict=True)
    ]
    shares = ", ".join(f"{x:.3f}" for x in held)
    text = f"{outcome.text}\ntheir share of the use, by layer: {shares}"
    return outcome._replace(report={**outcome.report, "share": held}, text=text)


def ranked(
    alike_EE: np.ndarray, load_E: np.ndarray | None, ids: np.ndarray, threshold: float
) -> Ranking:
    """The experts of a part by how much they would be missed.

    Of the two most alike one goes: the less used one, or without loads the later one; then again.

    Args:
      alike_EE: likeness of each pair of the layer.
      load_E: of each expert; None: not known.
      ids: of the part.
      threshold: as long as there is a pair of larger likeness, one of it is too many.
    """
    left = ids.tolist()
    gone = []
    needed = len(left)
    while len(left) > 1:
        among = alike_EE[np.ix_(left, left)].copy()
        np.fill_diagonal(among, -np.inf)
        first, second = np.unravel_index(among.argmax(), among.shape)
        pair = left[int(first)], left[int(second)]
        loses = max(pair)
        if load_E is not None:
            loses = min(pair, key=lambda i: (load_E[i], -i))
        if among.max() > threshold:
            needed -= 1
        left.remove(loses)
        gone.append(loses)
    return Ranking(np.array([*left, *reversed(gone)]), needed)


def by_value(
    subject: Subject, value_LE: np.ndarray, wanted: Sequence[Sequence[int] | np.ndarray]
) -> Ranked:
    """The experts of each part from the largest value on.

    Args:
      subject: the model.
      value_LE: of each expert.
      wanted: ids of those of each layer that should stay.
    """
    layers = []
    for value_E, ids_wanted in zip(value_LE, wanted, strict=True):
        rankings = []
        for ids in fewer.parts(subject.config.model):
            order = ids[np.argsort(-value_E[ids], kind="stable")]
            rankings.append(Ranking(order, int(np.isin(ids, ids_wanted).sum())))
        layers.append(rankings)
    return Ranked(layers, likeness.by_weights(subject))


def threshold_of(options: Mapping[str, Any]) -> float:
    """The likeness above which experts are alike."""
    threshold = options["threshold"]
    if threshold is not None and options["keep"] is not None:
        raise ValueError(
            f"--threshold={threshold}: --keep={options['keep']} says how many; name one"
        )
    threshold = THRESHOLD if threshold is None else threshold
    if not -1 <= threshold <= 1:
        raise ValueError(f"--threshold={threshold}: must be a cosine, from -1 to 1")
    return threshold


def cut(subject: Subject, ranked: Ranked, keep: int | None, why: str) -> Outcome:
    """The model with equally many experts in each layer, the first of each ranking.

    Args:
      subject: the model.
      ranked: its experts.
      keep: experts that stay in each layer; None: as many as the ranking says.
      why: the flag that says how many stay if `keep` does not.

    Raises:
      ValueError: for a number that leaves fewer experts than a token activates, or does not fit.
    """
    config = subject.config
    moe = config.model.moe
    e = moe.n_routed_experts
    needed = [sum(ranking.needed for ranking in layer) for layer in ranked.layers]
    number = max(r.needed for layer in ranked.layers for r in layer) * moe.router.n_group
    if keep is not None:
        why = f"--keep={keep}"
        number = keep
    fewer.check_number(config.model, number, why)
    each = number // moe.router.n_group
    ids_LN = [
        np.sort(np.concatenate([ranking.ids[:each] for ranking in layer]))
        for layer in ranked.layers
    ]
    layers = [fewer.kept(ids, alike_EE) for ids, alike_EE in zip(ids_LN, ranked.alike, strict=True)]
    lines = [f"{e} -> {number} experts in each of {len(layers)} layers ({why})"]
    if keep is None and min(needed) < number:
        lines.append(
            f"the layers need {', '.join(map(str, needed))}; all keep {number}, since all layers"
            " and groups have equally many"
        )
    experts = [ids.tolist() for ids in ids_LN]
    return Outcome(
        config=fewer.reduced_config(config, layers),
        model=fewer.reduced(config.model, subject.model, layers),
        report={"experts": experts, "needed": needed, **ranked.report},
        text="\n".join(filter(None, [*lines, ranked.text])),
        moments=lambda tree: fewer.reduced(config.model, tree, layers),
        load=lambda load_LE: fewer.reduced_load(load_LE, layers),
    )


def _most_alike(alike_EE: np.ndarray) -> float | None:
    """The largest likeness of two experts of a layer; None with one expert."""
    rows, columns = np.triu_indices(len(alike_EE), k=1)
    return float(alike_EE[rows, columns].max()) if len(rows) else None

"""Pruning: some experts of each layer stay, the others go, with their router rows and biases.

    likeness   of two experts that are alike one goes: the less used one, or without loads the later
    use        experts that a text does not need go, by its recorded loads
    extraction the experts that have a share of a domain's load stay: a model for that domain

All layers of a model have equally many experts.  So all keep as many as the layer that needs most;
a layer that needs fewer keeps the best of those that it could do without.  Groups of group-limited
routing stay equal in the same way.

Pruning of experts that no token chooses changes nothing where scores and gates depend on the
experts chosen alone: sigmoid and sqrtsoftplus scores, fixed tables, and a softmax whose gates are
normalised (`norm_topk_prob`), without a loss-free bias or limits to groups.  A softmax is over all
experts: without the pruned ones the scores of the others grow by the share that those had, and with
them V1's gates; a bias that is added to larger scores decides less.

Shapes: L MoE layers, E routed experts before, N after, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.model import layout
from dsmoe_jax.runs import loads
from dsmoe_jax.surgery import fewer, likeness, permutation
from dsmoe_jax.surgery.likeness import LIKENESS
from dsmoe_jax.surgery.types import Option, Outcome, Subject
from dsmoe_jax.training import freezing

THRESHOLD = 0.85  # likeness above which an expert is one too many
SHARE = 0.9  # of a domain's load that an extracted model keeps
USE = "use"

KEEP = Option(int, "Experts that stay in each layer, instead of a threshold or share.")
LOADS = (
    "a pass of recorded routing (DIRECTORY/validation-00000400), a metrics.jsonl, or an"
    " evaluation.json."
)
OPTIONS = {
    "by": Option(
        str,
        f"{', '.join([*LIKENESS, USE])}: what makes an expert one too many; weights, weights in the"
        " best order of hidden units, outputs on held-out text of the run, or that --loads have"
        " no token for it.",
        "weights",
    ),
    "threshold": Option(
        float, f"Likeness above which one of two experts goes; {THRESHOLD} without --keep."
    ),
    "keep": KEEP,
    "loads": Option(str, f"Recorded loads: {LOADS}  Of two alike experts the less used one goes."),
    "text": likeness.TEXT,
}
EXTRACTION_OPTIONS = {
    "loads": Option(str, f"Loads recorded on the domain's text: {LOADS}", needed=True),
    "share": Option(
        float, f"Share of each layer's load whose experts stay; {SHARE} without --keep."
    ),
    "keep": KEEP,
}


class Ranking(NamedTuple):
    """The experts of a layer or of a group of it, the one that should stay longest first.

    Attributes:
      ids: of the experts.
      needed: how many of them should stay.
    """

    ids: np.ndarray
    needed: int


def prune(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Leaves experts out that are like others, or that a text does not use.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for numbers that leave fewer experts than a token activates, or do not fit; for
        loads of another model.
    """
    config = subject.config
    permutation.check(config.model)
    by = options["by"]
    known = [*LIKENESS, USE]
    if by not in known:
        raise ValueError(f"--by={by}: must be one of {', '.join(known)}")
    load_LE = load(config, options["loads"])
    if by == USE:
        for name in ("threshold", "text"):
            if options[name] is not None:
                raise ValueError(f"--{name}={options[name]}: has no meaning for --by={USE}")
        if load_LE is None:
            raise ValueError(f"--loads: missing; --by={USE} counts the tokens of each expert")
        wanted = [np.flatnonzero(load_E) for load_E in load_LE]
        alike = likeness.likeness(subject, "weights", None)
        rankings = [_by_load(config, *layer) for layer in zip(load_LE, wanted, strict=True)]
        return _pruned(subject, rankings, alike, options, f"--by={USE}")
    threshold = threshold_of(options)
    alike = likeness.likeness(subject, by, options["text"])
    load_of = [None] * len(alike) if load_LE is None else load_LE
    rankings = [
        [ranked(alike_EE, load_E, ids, threshold) for ids in fewer.parts(config.model)]
        for alike_EE, load_E in zip(alike, load_of, strict=True)
    ]
    outcome = _pruned(subject, rankings, alike, options, f"--threshold={threshold}")
    largest = [_most_alike(alike_EE) for alike_EE in alike]
    numbers = ", ".join("-" if x is None else f"{x:.3f}" for x in largest)
    text = f"{outcome.text}\nlikeness of the most alike two, by layer: {numbers}"
    return outcome._replace(report={**outcome.report, "most_alike": largest}, text=text)


def extract(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """The sub-model that a domain needs: in each layer the experts with a share of its load.

    Args:
      subject: the model.
      options: values of `EXTRACTION_OPTIONS`.

    Raises:
      ValueError: as `prune` does.
    """
    config = subject.config
    permutation.check(config.model)
    share = options["share"]
    if share is not None and options["keep"] is not None:
        raise ValueError(f"--share={share}: --keep={options['keep']} says how many; name one")
    share = SHARE if share is None else share
    if not 0 < share <= 1:
        raise ValueError(f"--share={share}: must be above 0 and at most 1")
    load_LE = load(config, options["loads"])
    assert load_LE is not None, "it is needed"
    try:
        wanted = freezing.most_used(load_LE, share)
    except ValueError as error:
        raise ValueError(f"--loads={options['loads']}: {error}") from error
    rankings = [_by_load(config, *layer) for layer in zip(load_LE, wanted, strict=True)]
    alike = likeness.likeness(subject, "weights", None)
    outcome = _pruned(subject, rankings, alike, options, f"--share={share}")
    ids_LN = outcome.report["experts"]
    held = [
        float(load_E[ids].sum() / load_E.sum()) for load_E, ids in zip(load_LE, ids_LN, strict=True)
    ]
    shares = ", ".join(f"{x:.3f}" for x in held)
    text = f"{outcome.text}\ntheir share of the load, by layer: {shares}"
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


def _by_load(
    config: Config, load_E: np.ndarray, wanted: Sequence[int] | np.ndarray
) -> list[Ranking]:
    """The experts of each part by their load, of which those that are wanted should stay."""
    found = []
    for ids in fewer.parts(config.model):
        order = ids[np.argsort(-load_E[ids], kind="stable")]
        found.append(Ranking(order, int(np.isin(ids, wanted).sum())))
    return found


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


def load(config: Config, path: str | None) -> np.ndarray | None:
    """The load of each expert in every MoE layer, all samples together.

    Raises:
      ValueError: for loads of another model, or without the layers of multi-token prediction.
    """
    if path is None:
        return None
    load_LE = loads.read(path, config, "--loads").sum(axis=0)
    n_layers = sum(n for _, n in layout.moe_stacks(config.model))
    if len(load_LE) != n_layers:
        raise ValueError(
            f"--loads={path}: has {len(load_LE)} layers, none of multi-token prediction; must have"
            f" all {n_layers}, as the log of a training has"
        )
    return load_LE


def _pruned(
    subject: Subject,
    rankings: Sequence[Sequence[Ranking]],
    alike: Sequence[np.ndarray],
    options: Mapping[str, Any],
    why: str,
) -> Outcome:
    """The model with equally many experts in each layer, from the rankings of its groups."""
    config = subject.config
    moe = config.model.moe
    e = moe.n_routed_experts
    needed = [sum(ranking.needed for ranking in layer) for layer in rankings]
    if options["keep"] is not None:
        why = f"--keep={options['keep']}"
        number = options["keep"]
    else:
        number = max(r.needed for layer in rankings for r in layer) * moe.router.n_group
    fewer.check_number(config.model, number, why)
    each = number // moe.router.n_group
    ids_LN = [
        np.sort(np.concatenate([ranking.ids[:each] for ranking in layer])) for layer in rankings
    ]
    layers = [fewer.kept(ids, alike_EE) for ids, alike_EE in zip(ids_LN, alike, strict=True)]
    lines = [f"{e} -> {number} experts in each of {len(layers)} layers ({why})"]
    if options["keep"] is None and min(needed) < number:
        lines.append(
            f"the layers need {', '.join(map(str, needed))}; all keep {number}, since all layers"
            " and groups have equally many"
        )
    return Outcome(
        config=fewer.reduced_config(config, layers),
        model=fewer.reduced(config.model, subject.model, layers),
        report={"experts": [ids.tolist() for ids in ids_LN], "needed": needed},
        text="\n".join(lines),
        moments=lambda tree: fewer.reduced(config.model, tree, layers),
        load=lambda load_LE: fewer.reduced_load(load_LE, layers),
    )


def _most_alike(alike_EE: np.ndarray) -> float | None:
    """The largest likeness of two experts of a layer; None with one expert."""
    rows, columns = np.triu_indices(len(alike_EE), k=1)
    return float(alike_EE[rows, columns].max()) if len(rows) else None

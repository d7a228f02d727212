"""Merging: groups of experts become one each, the mean of their weights.

Experts are joined pair by pair, the most alike first; the likeness of two groups is that of their
least alike members (complete linkage).  Before the mean is taken, the hidden units of each expert
are put into the order that makes it most like the group's first one (the most used one, with
loads).  The mean is weighted by use, with loads.  Router rows and biases are means in the same
shares.  M-SMoE (2310.01334) merges by use after such an alignment, too.

Equal experts give the same function

- with a fixed table of one expert for each token;
- if those of a group have the same router rows and bias too, all groups are of m experts, and
  `per_token` is K / m: a token that chose all m of a group now chooses the one.  Gates that are
  neither normalised nor a softmax lose the factor m, which `routed_scaling_factor` gets.

Otherwise it is an approximation: with the same K a token has room for experts that it did not
choose before, and a mean of router rows is not the router of either.

Shapes: L MoE layers, E routed experts before, N after, F expert width, X numbers of a hidden unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.routers.scores import SCORING
from dsmoe_jax.surgery import evidence, fewer, likeness, permutation, pruning
from dsmoe_jax.surgery.evidence import LOADS, Evidence
from dsmoe_jax.surgery.likeness import LIKENESS, Weights
from dsmoe_jax.surgery.types import Option, Outcome, Subject

Groups = list[list[int]]  # experts that become one, by the first of each

OPTIONS = {
    "by": Option(
        str,
        f"{', '.join(LIKENESS)}: what makes experts alike; weights, weights in the best order of"
        " hidden units, or outputs on held-out text of the run.",
        "weights",
    ),
    "threshold": Option(
        float,
        f"Likeness above which experts become one; {pruning.THRESHOLD} without --keep.",
    ),
    "keep": pruning.KEEP,
    "together": Option(
        str,
        "Instead of a threshold: ids of experts that become one in every layer, as in 0,1;4,5,6;"
        " the others stay.",
    ),
    "loads": Option(str, f"Recorded loads: {LOADS}  Means are weighted by them."),
    "text": evidence.text_option(likeness.TEXTUAL),
    "per_token": Option(int, "Experts that a token activates afterwards; as many as before."),
}


def merge(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Makes one expert of those that are alike.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for numbers that leave fewer experts than a token activates, or do not fit; for
        loads of another model, and for experts of different kinds.
    """
    permutation.check(subject.config.model)
    by = options["by"]
    if by not in LIKENESS:
        raise ValueError(f"--by={by}: must be one of {', '.join(LIKENESS)}")
    use_LE = evidence.use_of(subject, options["loads"])
    per_token = options["per_token"]
    if options["together"] is not None:
        return _of_groups(subject, _together(subject, options), use_LE, per_token)
    threshold = pruning.threshold_of(options)
    text = evidence.text_of_run(subject, by, options["text"], LIKENESS[by].batches)
    return merged_by(
        subject,
        by,
        Evidence(text, use_LE),
        keep=options["keep"],
        threshold=threshold,
        per_token=per_token,
    )


def merged_by(
    subject: Subject,
    by: str,
    found: Evidence,
    *,
    keep: int | None = None,
    threshold: float = pruning.THRESHOLD,
    per_token: int | None = None,
) -> Outcome:
    """`merge` from evidence that is there.

    Args:
      subject: the model.
      by: a name in `LIKENESS`.
      found: what the likeness takes, and the use by which means are weighted, if it is known.
      keep: experts of each layer afterwards; None: as many as the threshold leaves.
      threshold: of likeness.
      per_token: experts that a token activates afterwards; None: as many as before.

    Raises:
      ValueError: as `merge` does.
    """
    model = subject.config.model
    alike = LIKENESS[by].run(subject, found.text)
    parts = fewer.parts(model)
    n_parts, size = parts.shape
    if size == 1:
        raise ValueError(
            f"model.moe.router.n_group={n_parts}: leaves one expert in each group, and none to"
            " merge it with"
        )
    trees = [[linked(alike_EE, ids, threshold) for ids in parts] for alike_EE in alike]
    needed = [sum(n for _, n in layer) for layer in trees]
    why = f"--threshold={threshold}"
    number = max(n for layer in trees for _, n in layer) * n_parts
    if keep is not None:
        number = keep
        why = f"--keep={number}"
        needed = [number] * len(alike)
    fewer.check_number(_with_k(subject.config, per_token).model, number, why)
    groups = [
        [
            group
            for (joins, _), ids in zip(layer, parts, strict=True)
            for group in cut(joins, ids, number // n_parts)
        ]
        for layer in trees
    ]
    return _of_groups(subject, _Chosen(groups, why, needed), found.use_LE, per_token)


class _Chosen(NamedTuple):
    """The groups of every layer, the flag that says so, and how many each layer would need."""

    groups: list[Groups]
    why: str
    needed: list[int]


def _of_groups(
    subject: Subject, chosen: _Chosen, use_LE: np.ndarray | None, per_token: int | None
) -> Outcome:
    """The model in which the experts of each group are one."""
    config = _with_k(subject.config, per_token)
    number = len(chosen.groups[0])
    fewer.check_number(config.model, number, chosen.why)
    layers = []
    for layer, weights in enumerate(likeness.of_layers(subject)):
        use_E = None if use_LE is None else use_LE[layer]
        layers.append(merged(chosen.groups[layer], weights, use_E))
    e = config.model.moe.n_routed_experts
    lines = [f"{e} -> {number} experts in each of {len(layers)} layers ({chosen.why})"]
    if min(chosen.needed) < number:
        lines.append(
            f"by the threshold {', '.join(map(str, chosen.needed))} would do; all have {number},"
            " since all layers and groups have equally many"
        )
    return Outcome(
        config=fewer.reduced_config(config, layers),
        model=fewer.reduced(subject.config.model, subject.model, layers),
        report={"experts": chosen.groups, "needed": chosen.needed},
        text="\n".join(lines),
        load=lambda load_LE: fewer.reduced_load(load_LE, layers),
    )


def merged(groups: Groups, weights: Weights, load_E: np.ndarray | None) -> fewer.Layer:
    """Shares and orders of hidden units by which the experts of a layer become fewer.

    Args:
      groups: ids of experts that become one.
      weights: of the layer.
      load_E: use of each expert; None: all count the same.
    """
    units_EFX = likeness.units(weights)
    e, f, _ = units_EFX.shape
    share_NE = np.zeros((len(groups), e))
    units_EF = np.tile(np.arange(f), (e, 1))
    for n, ids in enumerate(groups):
        use = np.ones(len(ids)) if load_E is None else load_E[ids]
        # Experts without any use among each other count the same.
        share_NE[n, ids] = use / use.sum() if use.sum() else 1 / len(ids)
        first = ids[int(use.argmax())]
        for i in ids:
            units_EF[i] = likeness.alignment(units_EFX[i], units_EFX[first])
    # Tables: to the new expert that it is part of; no token of a table loses its expert.
    member_EN = np.zeros((e, len(groups)), bool)
    for n, ids in enumerate(groups):
        member_EN[ids, n] = True
    return fewer.Layer(share_NE, np.argsort(~member_EN, axis=1, kind="stable"), units_EF)


def linked(alike_EE: np.ndarray, ids: np.ndarray, threshold: float) -> tuple[np.ndarray, int]:
    """The order in which experts of a part are joined, and the groups that a threshold leaves.

    Args:
      alike_EE: likeness of each pair of the layer.
      ids: of the part.
      threshold: pairs of larger likeness are joined.

    Returns:
      Joins as `scipy.cluster.hierarchy.linkage` gives them, and the number.
    """
    distance = np.clip(1 - alike_EE[np.ix_(ids, ids)], 0, None)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    joins = hierarchy.linkage(squareform(distance, checks=False), "complete")
    return joins, len(ids) - int((joins[:, 2] < 1 - threshold).sum())


def cut(joins: np.ndarray, ids: np.ndarray, n: int) -> Groups:
    """The n groups that the first joins make, by their first expert."""
    label = hierarchy.cut_tree(joins, n_clusters=n).ravel()
    return sorted(ids[label == i].tolist() for i in range(n))


def _together(subject: Subject, options: Mapping[str, Any]) -> _Chosen:
    """The groups that a user names, in every layer."""
    why = f"--together={options['together']}"
    for name in ("threshold", "keep", "text"):
        if options[name] is not None:
            raise ValueError(f"--{name}={options[name]}: {why} says which; name one")
    n_layers = len(likeness.of_layers(subject))
    groups = _named(subject.config.model, options["together"])
    return _Chosen([groups] * n_layers, why, [len(groups)] * n_layers)


def _named(model: ModelConfig, together: str) -> Groups:
    """The groups that a user names, and each other expert by itself.

    Raises:
      ValueError: for what is no list of ids, ids twice, identity experts and different groups.
    """
    key = f"--together={together}"
    moe = model.moe
    e = moe.n_routed_experts
    try:
        named = [[int(i) for i in ids.split(",")] for ids in together.split(";")]
    except ValueError:
        raise ValueError(f"{key}: must be ids of experts, as in 0,1;4,5,6") from None
    flat = [i for ids in named for i in ids]
    for i in flat:
        if e <= i < moe.n_choices:
            raise ValueError(
                f"{key}: {i} is an identity expert, which computes nothing; routed experts, 0 to"
                f" {e - 1}, are merged with each other alone"
            )
        if not 0 <= i < e:
            raise ValueError(f"{key}: {i} is no expert; must be ids from 0 to {e - 1}")
    if len(set(flat)) < len(flat):
        raise ValueError(f"{key}: an expert is there twice; must be different ids")
    size = e // moe.router.n_group
    if any(len({i // size for i in ids}) > 1 for ids in named):
        raise ValueError(
            f"{key}: experts of different groups of model.moe.router.n_group={moe.router.n_group};"
            " must be of one"
        )
    groups = sorted([*map(sorted, named), *([i] for i in range(e) if i not in flat)])
    number_of = [sum(ids[0] // size == g for ids in groups) for g in range(moe.router.n_group)]
    if len(set(number_of)) > 1:
        raise ValueError(
            f"{key}: leaves {number_of} experts in the groups of"
            f" model.moe.router.n_group={moe.router.n_group}; must be equally many"
        )
    return groups


def _with_k(config: Config, k: int | None) -> Config:
    """The config with another K, whose gates have the same sum where that depends on K.

    Raises:
      ValueError: for a K that is none, or that the router does not have.
    """
    moe = config.model.moe
    if k is None or k == moe.num_experts_per_tok:
        return config
    if not 1 <= k <= moe.n_routed_experts:
        raise ValueError(f"--per_token={k}: must be 1 to the {moe.n_routed_experts} experts")
    router, _ = get_router(moe)
    if router.own_k:
        own = moe.num_experts_per_tok
        raise ValueError(
            f"--per_token={k}: the {moe.router.name} router has a table of {own} experts for each"
            f" token; must be {own}"
        )
    changed: dict[str, Any] = {"model.moe.num_experts_per_tok": k}
    sums_to_one = moe.router.norm_topk_prob or SCORING[moe.router.scoring_func].is_softmax
    if "routed_scaling_factor" in router.settings_read and not sums_to_one:
        factor = moe.router.routed_scaling_factor * moe.num_experts_per_tok / k
        changed["model.moe.router.routed_scaling_factor"] = factor
    config = replace(config, **changed)
    try:
        get_router(config.model.moe)
    except ValueError as error:
        raise ValueError(f"--per_token={k}: {error}") from error
    return config


__all__ = ["OPTIONS", "cut", "linked", "merge", "merged", "merged_by"]

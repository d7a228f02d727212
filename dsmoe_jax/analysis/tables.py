"""The tables that `python -m dsmoe_jax analyse` writes, each a line of `TABLES`.

A table is a function from a `Subject` to what JSON can hold.  Numbers that do not exist (an expert
without tokens, a domain without text) are None.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, G domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.analysis import committee, pairs, specialisation, standing
from dsmoe_jax.analysis.routed_text import LayerWeights, RoutedText
from dsmoe_jax.runs import summaries

MIN_COUNT = 20  # occurrences of a token id, for its shares to say something
FAVOURITES = 12  # token ids listed for each expert
Tables = dict[str, Any]  # what `compute` returns
ALIKE = 0.85  # similarity from which experts are taken for doubles (a blog's advice for pruning)


@dataclasses.dataclass(frozen=True)
class Subject:
    """All that tables are made from.

    Attributes:
      text: routing of a text.
      layers: weights by layer; empty where only routing is known.
      earlier: routing of the same text by checkpoints before, by step.
    """

    text: RoutedText
    layers: Sequence[LayerWeights] = ()
    earlier: Mapping[int, RoutedText] = dataclasses.field(default_factory=dict)


class Table(NamedTuple):
    """A line of the registry.

    Attributes:
      compute: the function.
      weights: whether it looks at `Subject.layers`.
    """

    compute: Callable[[Subject], Any]
    weights: bool = False


def domains(subject: Subject) -> dict[str, Any]:
    """Load of the experts by domain, how much it says, and the domain that each serves above all.

    `domain_specialisation` is that of `summaries.domain_specialisation`; None with fewer than two
    domains of enough tokens.
    """
    text = subject.text
    load_GLE = _by_domain(text)
    tokens_G = np.bincount(text.domain_T, minlength=len(text.domains))
    return {
        "names": list(text.domains),
        "tokens": tokens_G.tolist(),
        "load": load_GLE.tolist(),
        "served_above_all": specialisation.distinct_domains(load_GLE),
        "domain_specialisation": summaries.domain_specialisation(load_GLE, tokens_G),
    }


def vocabulary(subject: Subject) -> dict[str, Any]:
    """Favourite token ids of each expert, and how far the token alone decides the expert."""
    text = subject.text
    table = specialisation.by_vocabulary(text.ids_LTK, text.token_ids_T, text.n_experts, MIN_COUNT)
    layers = range(text.n_layers)
    return {
        "min_count": MIN_COUNT,
        "token_ids": len(table.token_ids_C),
        "vocabulary_specialisation": specialisation.vocabulary_specialisation(table),
        "favourites": [specialisation.favourite_tokens(table, i, FAVOURITES) for i in layers],
    }


def positions(subject: Subject) -> dict[str, Any]:
    """Load of the experts by position in the document, in ranges that double."""
    text = subject.text
    ranges, range_T = specialisation.position_ranges(text.position_T)
    load_PLE = specialisation.load_by_group(text.ids_LTK, range_T, len(ranges), text.n_experts)
    tokens_P = np.bincount(range_T, minlength=len(ranges))
    return {"ranges": ranges, "tokens": tokens_P.tolist(), "load": load_PLE.tolist()}


def loads(subject: Subject) -> dict[str, Any]:
    """Load of the experts by layer and how even it is; see `summaries.load_summary`."""
    text = subject.text
    nothing_T = np.zeros(text.n_tokens, np.int32)
    load_GLE = specialisation.load_by_group(text.ids_LTK, nothing_T, 1, text.n_experts)
    return summaries.load_summary(load_GLE[0])


def experts_per_token(subject: Subject) -> dict[str, Any]:
    """Effective number of experts of a token, mean over tokens: by layer, and by domain."""
    text = subject.text
    number_LT = committee.experts_per_token(text.gates_LTK)
    by_domain = {
        name: number_LT[:, text.domain_T == g].mean(axis=1).tolist()
        for g, name in enumerate(text.domains)
        if (text.domain_T == g).any()
    }
    return {"mean": number_LT.mean(axis=1).tolist(), "by_domain": by_domain}


def committees(subject: Subject) -> dict[str, Any]:
    """Committees by layer: of all text, of each domain, and how far the domains share theirs.

    Domains of fewer tokens than `summaries.MIN_DOMAIN_TOKENS` have none: chance would choose it.
    `chance_overlap` is the overlap of sets of the same sizes drawn at random; `in_every_domain`
    are the experts that all domains' committees have, and `mass_in_every_domain` is their share of
    all gates.
    """
    text = subject.text
    mass_GLE = specialisation.sums_by_group(
        text.gates_LTK, text.ids_LTK, text.domain_T, len(text.domains), text.n_experts
    )
    tokens_G = np.bincount(text.domain_T, minlength=len(text.domains))
    large = [g for g, tokens in enumerate(tokens_G) if tokens >= summaries.MIN_DOMAIN_TOKENS]
    return {
        "share_of_mass": committee.HALF,
        "layers": [_committees(mass_GE, large, text) for mass_GE in mass_GLE.swapaxes(0, 1)],
    }


def _committees(mass_GE: np.ndarray, large: Sequence[int], text: RoutedText) -> dict[str, Any]:
    """`committees` of one layer."""
    by_domain = [committee.committee(mass_GE[g]) for g in large]
    mass_E = mass_GE.sum(axis=0)
    whole = committee.committee(mass_E)
    shared = committee.in_every(by_domain)
    sizes = [len(members) for members in by_domain]
    comparable = len(by_domain) > 1
    return {
        "members": whole,
        "share_of_experts": len(whole) / text.n_experts,
        "by_domain": {text.domains[g]: found for g, found in zip(large, by_domain, strict=True)},
        "in_every_domain": shared if comparable else None,
        "mass_in_every_domain": float(mass_E[shared].sum() / mass_E.sum()) if comparable else None,
        "overlap": committee.mean_overlap(by_domain),
        "chance_overlap": committee.chance_overlap(sizes, text.n_experts) if comparable else None,
    }


def standing_committees(subject: Subject) -> list[dict[str, Any]] | None:
    """Few experts for every domain, and experts for one, by layer; see `standing`.

    None with fewer than two domains of enough tokens.
    """
    found = standing.of_text(subject.text)
    if found is None:
        return None
    return [{name: getattr(layer, name)._asdict() for name in layer._fields} for layer in found]


def coactivation(subject: Subject) -> dict[str, Any]:
    """Share of each expert's tokens that another one computes too, by layer, (E, E)."""
    text = subject.text
    by_layer = [pairs.coactivation(ids_TK, text.n_experts) for ids_TK in text.ids_LTK]
    return {"share": [np.round(share_EE, 5).tolist() for share_EE in by_layer]}


def saturation(subject: Subject) -> dict[str, Any]:
    """Share of a token's experts that an earlier checkpoint chose too, by step and layer."""
    text = subject.text
    return {
        str(step): pairs.agreement(text.ids_LTK, earlier.ids_LTK, text.n_experts)
        for step, earlier in subject.earlier.items()
    }


def similarity(subject: Subject) -> dict[str, Any]:
    """Likeness of the experts' weights and of their outputs, by layer: means and the doubles."""
    layers = []
    for layer in subject.layers:
        weights_EE = pairs.weight_similarity(*layer.weights)
        outputs_EE = pairs.output_similarity(layer.outputs_ETD)
        layers.append(
            {
                "weights_mean": pairs.mean_of_pairs(weights_EE),
                "outputs_mean": pairs.mean_of_pairs(outputs_EE),
                "weights": np.round(weights_EE, 5).tolist(),
                "outputs": np.round(outputs_EE, 5).tolist(),
                "alike_in_weights": pairs.alike(weights_EE, ALIKE),
                "alike_in_outputs": pairs.alike(outputs_EE, ALIKE),
            }
        )
    return {"threshold": ALIKE, "layers": layers}


TABLES: dict[str, Table] = {
    "load": Table(loads),
    "domains": Table(domains),
    "positions": Table(positions),
    "vocabulary": Table(vocabulary),
    "experts_per_token": Table(experts_per_token),
    "committees": Table(committees),
    "standing_committees": Table(standing_committees),
    "coactivation": Table(coactivation),
    "saturation": Table(saturation),
    "similarity": Table(similarity, weights=True),
}


def compute(subject: Subject) -> Tables:
    """All tables; without weights, those that need none."""
    return {
        name: table.compute(subject)
        for name, table in TABLES.items()
        if subject.layers or not table.weights
    }


def _by_domain(text: RoutedText) -> np.ndarray:
    return specialisation.load_by_group(
        text.ids_LTK, text.domain_T, len(text.domains), text.n_experts
    )

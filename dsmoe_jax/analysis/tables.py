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
      others: ids_LTK of the same text, or of its beginning, by name: as it was routed at an earlier
        step ("step 240"), or without the intervention.
    """

    text: RoutedText
    layers: Sequence[LayerWeights] = ()
    others: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Table(NamedTuple):
    """A line of the registry.

    Attributes:
      compute: the function.
      weights: whether it looks at `Subject.layers`.
      cheap: whether it is made during training too.
    """

    compute: Callable[[Subject], Any]
    weights: bool = False
    cheap: bool = True


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
    `overlaps` are of every two domains, in the order of `by_domain`, and `overlap` is their mean;
    `chance_overlap` is that of sets of the same sizes drawn at random; `in_every_domain` are the
    experts that all domains' committees have, and `mass_in_every_domain` is their share of all
    gates.
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
    comparable = len(by_domain) > 1 and mass_E.any()
    return {
        "members": whole,
        "share_of_experts": len(whole) / text.n_experts,
        "by_domain": {text.domains[g]: found for g, found in zip(large, by_domain, strict=True)},
        "in_every_domain": shared if comparable else None,
        "mass_in_every_domain": float(mass_E[shared].sum() / mass_E.sum()) if comparable else None,
        "overlap": committee.mean_overlap(by_domain),
        "overlaps": committee.overlaps(by_domain),
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
    """Share of a token's experts that another routing chose too, by its name and layer.

    Of an earlier checkpoint it is the router saturation of OLMoE, see `pairs.agreement`.  Where the
    two are of different lengths, it is of the tokens that both have.
    """
    text = subject.text
    found = {}
    for name, ids_LTK in subject.others.items():
        both = slice(min(text.n_tokens, ids_LTK.shape[1]))
        found[name] = pairs.agreement(text.ids_LTK[:, both], ids_LTK[:, both], text.n_experts)
    return found


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
    "standing_committees": Table(standing_committees, cheap=False),
    "coactivation": Table(coactivation, cheap=False),  # E times as large as the others
    "saturation": Table(saturation),
    "similarity": Table(similarity, weights=True, cheap=False),
}


def compute(subject: Subject, *, only_cheap: bool = False) -> Tables:
    """All tables, or only the cheap ones; without weights, those that need none."""
    return {
        name: table.compute(subject)
        for name, table in TABLES.items()
        if (subject.layers or not table.weights) and (table.cheap or not only_cheap)
    }


def by_layer(found: Tables) -> dict[str, list[Any]]:
    """One number a layer of each table that has one, by name: what curves and measures are of.

    `router_saturation` is the agreement with the last of the other routings.
    """
    layers = found["committees"]["layers"]
    numbers = {
        "committee": [layer["share_of_experts"] for layer in layers],
        "committee_overlap": [layer["overlap"] for layer in layers],
        "committee_chance_overlap": [layer["chance_overlap"] for layer in layers],
        "mass_in_every_domain": [layer["mass_in_every_domain"] for layer in layers],
        "vocabulary_specialisation": found["vocabulary"]["vocabulary_specialisation"],
        "experts_per_token": found["experts_per_token"]["mean"],
    }
    if found["domains"]["domain_specialisation"] is not None:
        numbers["domain_specialisation"] = found["domains"]["domain_specialisation"]
    if found["saturation"]:
        numbers["router_saturation"] = list(found["saturation"].values())[-1]
    if "standing_committees" in found:
        standing = found["standing_committees"] or []
        numbers |= {
            "standing_committee": [layer["seen"]["size"] for layer in standing],
            "standing_if_blind": [layer["blind"]["size"] for layer in standing],
            "overlap_if_blind": [layer["blind"]["overlap"] for layer in standing],
            "specific": [layer["seen"]["specific"] for layer in standing],
            "specific_if_blind": [layer["blind"]["specific"] for layer in standing],
            "standing_by_token": [layer["by_token"]["size"] for layer in standing],
            "overlap_by_token": [layer["by_token"]["overlap"] for layer in standing],
            "specific_by_token": [layer["by_token"]["specific"] for layer in standing],
        }
    if "similarity" in found:
        alike = found["similarity"]["layers"]
        numbers["weights_alike"] = [layer["weights_mean"] for layer in alike]
        numbers["outputs_alike"] = [layer["outputs_mean"] for layer in alike]
    return numbers


def _by_domain(text: RoutedText) -> np.ndarray:
    return specialisation.load_by_group(
        text.ids_LTK, text.domain_T, len(text.domains), text.n_experts
    )

"""Measures of the experts themselves: what they serve, and how alike they are."""

from __future__ import annotations

import numpy as np

from dsmoe_jax.study import readings
from dsmoe_jax.study.measures.measure import Measure

INSIDE: dict[str, Measure] = {
    "domain_specialisation": Measure(
        "domain specialisation",
        readings.held_out("domain_specialisation", np.mean),  # see runs/summaries.py
        note="Domain specialisation: how much a chosen expert says about the domain of its token on"
        " the held-out text: 0 where all domains use the same experts, 1 where every expert serves"
        " one domain; mean over layers.",
    ),
    "language_specialisation": Measure(
        "specialisation by language",
        readings.by_language,
        note="Specialisation by language: the domain specialisation between languages, of the kind"
        " of text that most languages have.",
    ),
    "kind_specialisation": Measure(
        "specialisation by kind of text",
        readings.by_kind,
        note="Specialisation by kind of text: the domain specialisation between kinds of text, in"
        " the language that has most kinds.",
    ),
    "language_over_kind": Measure(
        "specialisation by language over that by kind of text", readings.language_over_kind
    ),
    "vocabulary_specialisation": Measure(
        "vocabulary specialisation",
        readings.inside("vocabulary_specialisation"),
        note="Vocabulary specialisation: the largest share of one expert in the occurrences of a"
        " token id, mean over ids that occur often enough, and over layers.",
    ),
    "committee": Measure(
        "committee of half the gates",
        readings.inside("committee", 100),
        "% of the experts",
        digits=1,
        note="Committee: the smallest set of experts with half of the sum of all gates; mean over"
        " layers.",
    ),
    "committee_overlap": Measure(
        "overlap of the domains' committees",
        readings.inside("committee_overlap"),
        note="Overlap: Jaccard index of two domains' committees, mean over pairs and layers.",
    ),
    "overlap_if_blind": Measure(
        "overlap of blind committees",
        readings.inside("overlap_if_blind"),
        note="Blind: if domains made no difference, with the domains of the sequences shuffled,"
        " which leaves the loads as they are; mean over 20 shuffles.",
    ),
    "invariance": Measure(
        "invariance of the committees",
        readings.invariance,
        "%",
        digits=1,
        note="Invariance: 0 where two domains' committees overlap as random sets of the same sizes"
        " do, 100 where they overlap as blind ones.",
    ),
    "standing_committee": Measure(
        "standing committee",
        readings.inside("standing_committee", 100),
        "% of the experts",
        digits=1,
        note="Standing committee: few experts that hold half of the gates in every domain; if all"
        " experts had equal gates, 50 %.",
    ),
    "standing_if_blind": Measure(
        "blind standing committee",
        readings.inside("standing_if_blind", 100),
        "% of the experts",
        digits=1,
    ),
    "specific_over_blind": Measure(
        "experts of a domain over blind",
        readings.specific_over("specific_if_blind"),
        "points of %",
        digits=1,
        note="Experts of a domain: with at least twice their mean share of the gates in one.",
    ),
    "specific_over_token": Measure(
        "experts of a domain over tokens",
        readings.specific_over("specific_by_token"),
        "points of %",
        digits=1,
        note="Over blind, over tokens: less those that there would be if domains made no"
        " difference, or if the token alone decided, each with the mean gates of all of its id.",
    ),
    "experts_per_token": Measure(
        "effective experts of a token",
        readings.inside("experts_per_token"),
        digits=2,
        note="Effective experts of a token: exp of the entropy of its gates, divided by their sum.",
    ),
    "weights_alike": Measure(
        "likeness of two experts' weights", readings.inside("weights_alike"), lower_is_better=True
    ),
    "outputs_alike": Measure(
        "likeness of two experts' outputs",
        readings.inside("outputs_alike"),
        lower_is_better=True,
        note="Likeness: mean cosine over pairs of experts; of outputs, for the same tokens.",
    ),
    "outputs_cka": Measure(
        "CKA of outputs over start",
        readings.over_before("outputs_cka"),
        lower_is_better=True,
        note="CKA: linear and unbiased, of two experts' outputs for the same tokens, mean over"
        " pairs and layers. Over start: less the same of a model of its sizes before training.",
    ),
    "weights_aligned": Measure(
        "likeness of matched weights over start",
        readings.over_before("weights_aligned"),
        lower_is_better=True,
        note="Matched weights: of two experts, with their hidden units in the order in which they"
        " are most alike.",
    ),
    "distinct_experts": Measure(
        "clearly distinct experts",
        readings.inside("distinct", 100),
        "% of the experts",
        digits=1,
        note="Clearly distinct: to no other expert of its layer as alike as 0.85 in its outputs.",
    ),
}

"""Standing committees: few experts that serve every domain, beside experts that serve one.

2601.03425 finds that a few routed experts take most of the routing mass whatever the domain;
2604.05267 that models have experts of single domains.  Both are asked here beside two routings of
the same loads:

    blind       domains make no difference: the same sequences with their domains shuffled
    by token    the token alone decides: each has the mean gates of all tokens of its id

An expert that is busy everywhere proves nothing about domains, and one of Chinese characters is an
expert of Chinese without knowing more than the token.

Shapes: T tokens, L MoE layers, S sequences, E routed experts, G domains, V token ids of the text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsmoe_jax.analysis import committee, specialisation
from dsmoe_jax.analysis.routed_text import RoutedText
from dsmoe_jax.runs.summaries import MIN_DOMAIN_TOKENS

SHUFFLES = 20
TWICE = 2.0  # an expert serves a domain above all if it does this many times its mean share there


class Standing(NamedTuple):
    """Numbers of one layer.

    Attributes:
      size: experts that hold half of the gates in every domain, as a share of E; see `standing`.
      overlap: Jaccard index of two domains' committees, mean over pairs.
      specific: share of the experts that have `TWICE` their mean share in some domain, or more.
    """

    size: float
    overlap: float
    specific: float


class Found(NamedTuple):
    """A layer as it is, and with the routings beside it; blind is a mean over shuffles."""

    seen: Standing
    blind: Standing
    by_token: Standing


def standing(share_GE: np.ndarray, wanted: float = committee.HALF) -> tuple[list[int], float]:
    """Few experts that have a share of the mass of every group, and how many they are.

    Each next one is the expert that brings most of what groups still lack (of several, the one of
    the largest share), the usual approximation of the smallest such set.  Of the last one only the
    part that is needed counts, so that the number is no step function: with even shares it is
    `wanted` x E.

    Args:
      share_GE: shares of the experts in the mass of each group; rows sum to 1.
      wanted: the share that every group must reach.
    """
    assert (share_GE.sum(axis=1) > wanted).all(), "every group has mass"
    lacking_G = np.full(len(share_GE), wanted)
    members: list[int] = []
    while True:
        brought_E = np.minimum(share_GE, lacking_G[:, None]).sum(axis=0)
        brought_E[members] = -1.0
        is_best_E = brought_E >= brought_E.max() * (1 - 1e-12)
        best = int(np.where(is_best_E, share_GE.sum(axis=0), -1.0).argmax())
        share_G = share_GE[:, best]
        members.append(best)
        if (share_G >= lacking_G * (1 - 1e-12)).all():
            lacks_G = lacking_G > 0
            part = np.max(lacking_G[lacks_G] / share_G[lacks_G], initial=0.0)
            return members, len(members) - 1 + float(part)
        lacking_G = np.maximum(lacking_G - share_G, 0.0)


def specific(share_GE: np.ndarray) -> np.ndarray:
    """The largest share of each expert in a domain, as a multiple of its mean over domains, (E,).

    0 for an expert without mass.
    """
    mean_E = share_GE.mean(axis=0)
    largest_E = share_GE.max(axis=0)
    return np.divide(largest_E, mean_E, out=np.zeros_like(mean_E), where=mean_E > 0)


def of_text(text: RoutedText, seed: int = 0) -> list[Found] | None:
    """The numbers of each layer of a routed text.

    Args:
      text: its sequences are of one domain each; domains of fewer tokens than
        `summaries.MIN_DOMAIN_TOKENS` are left out.
      seed: of the shuffles.

    Returns:
      None with fewer than two domains of enough tokens.
    """
    tokens_G = np.bincount(text.domain_T, minlength=len(text.domains))
    large_G = tokens_G >= MIN_DOMAIN_TOKENS
    if large_G.sum() < 2:
        return None
    _, first_S, sequence_T = np.unique(text.sequence_T, return_index=True, return_inverse=True)
    domain_S = text.domain_T[first_S]
    mass_SLE = specialisation.sums_by_group(
        text.gates_LTK, text.ids_LTK, sequence_T, len(first_S), text.n_experts
    )
    kept_S = large_G[domain_S]
    mass_SLE = mass_SLE[kept_S]
    place_S = np.unique(domain_S[kept_S], return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    shuffled = [_by_domain(mass_SLE, rng.permutation(place_S)) for _ in range(SHUFFLES)]
    blind_L = zip(*map(_layers, shuffled), strict=True)
    return [
        Found(seen, Standing(*np.mean(blind, axis=0).tolist()), by_token)
        for seen, blind, by_token in zip(
            _layers(_by_domain(mass_SLE, place_S)),
            blind_L,
            _layers(_by_token(text)[large_G]),
            strict=True,
        )
    ]


def _by_domain(mass_SLE: np.ndarray, domain_S: np.ndarray) -> np.ndarray:
    """Gates by domain, (G, L, E)."""
    return np.stack([mass_SLE[domain_S == g].sum(axis=0) for g in range(domain_S.max() + 1)])


def _by_token(text: RoutedText) -> np.ndarray:
    """Gates by domain, (G, L, E), if each token had the mean gates of all tokens of its id."""
    _, place_T, count_V = np.unique(text.token_ids_T, return_inverse=True, return_counts=True)
    mass_VLE = specialisation.sums_by_group(
        text.gates_LTK, text.ids_LTK, place_T, len(count_V), text.n_experts
    )
    n_domains = len(text.domains)
    pairs_T = text.domain_T.astype(np.int64) * len(count_V) + place_T
    count_GV = np.bincount(pairs_T, minlength=n_domains * len(count_V)).reshape(n_domains, -1)
    return np.tensordot(count_GV / count_V, mass_VLE, axes=1)


def _layers(mass_GLE: np.ndarray) -> list[Standing]:
    return [_numbers(share_GE) for share_GE in specialisation.shares(mass_GLE).swapaxes(0, 1)]


def _numbers(share_GE: np.ndarray) -> Standing:
    n_experts = share_GE.shape[1]
    overlap = committee.mean_overlap([committee.committee(share_E) for share_E in share_GE])
    assert overlap is not None, "every domain has gates"
    is_specific_E = specific(share_GE) >= TWICE
    return Standing(standing(share_GE)[1] / n_experts, overlap, float(is_specific_E.mean()))

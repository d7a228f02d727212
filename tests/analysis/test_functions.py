"""The analysis functions against hand-made routings with known answers, and against plain loops.

Shapes: as in dsmoe_jax/analysis.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.analysis import committee, pairs, specialisation
from dsmoe_jax.analysis.routed_text import RoutedText


@st.composite
def routings(draw):
    """(ids_LTK, gates_LTK, group_T, groups, experts); some columns unassigned, with gate 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, n_experts))
    n_tokens, n_layers, n_groups = draw(st.tuples(*[st.integers(1, n) for n in (30, 3, 4)]))
    shape = (n_layers, n_tokens, k)
    ids_LTK = np.argsort(rng.random((*shape[:2], n_experts)), axis=2)[..., :k].astype(np.int32)
    gates_LTK = rng.random(shape).astype(np.float32)
    missing_LTK = rng.random(shape) < draw(st.sampled_from([0.0, 0.3]))
    ids_LTK[missing_LTK] = n_experts
    gates_LTK[missing_LTK] = 0
    return ids_LTK, gates_LTK, rng.integers(0, n_groups, n_tokens), n_groups, n_experts


@given(routings())
def test_loads_masses_and_pairs_are_those_of_plain_loops(case):
    ids_LTK, gates_LTK, group_T, n_groups, n_experts = case
    load_GLE = np.zeros((n_groups, len(ids_LTK), n_experts), int)
    mass_GLE = np.zeros(load_GLE.shape)
    together_LEE = np.zeros((len(ids_LTK), n_experts, n_experts))
    for layer, t in itertools.product(*map(range, ids_LTK.shape[:2])):
        columns = zip(ids_LTK[layer, t], gates_LTK[layer, t], strict=True)
        chosen = [(expert, gate) for expert, gate in columns if expert < n_experts]
        for expert, gate in chosen:
            load_GLE[group_T[t], layer, expert] += 1
            mass_GLE[group_T[t], layer, expert] += gate
            for other, _ in chosen:
                together_LEE[layer, expert, other] += 1
    groups = group_T, n_groups, n_experts
    np.testing.assert_array_equal(specialisation.load_by_group(ids_LTK, *groups), load_GLE)
    got_GLE = specialisation.sums_by_group(gates_LTK, ids_LTK, *groups)
    np.testing.assert_allclose(got_GLE, mass_GLE, rtol=1e-6)
    for layer, together_EE in enumerate(together_LEE):
        tokens_E1 = np.maximum(np.diag(together_EE), 1)[:, None]
        got_EE = pairs.coactivation(ids_LTK[layer], n_experts)
        np.testing.assert_allclose(got_EE, together_EE / tokens_E1, atol=1e-12)


@given(routings())
def test_vocabulary_is_that_of_plain_loops(case):
    ids_LTK, _, token_ids_T, _, n_experts = case
    table = specialisation.by_vocabulary(ids_LTK, token_ids_T, n_experts, min_count=2)
    often = [v for v in np.unique(token_ids_T) if (token_ids_T == v).sum() >= 2]
    assert table.token_ids_C.tolist() == often
    for (c, v), e in itertools.product(enumerate(often), range(n_experts)):
        wanted = (ids_LTK[:, token_ids_T == v] == e).any(axis=2).mean(axis=1)
        np.testing.assert_allclose(table.share_LCE[:, c, e], wanted)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.floats(0.05, 1.0))
def test_no_smaller_set_has_the_share_of_a_committee(mass, share):
    mass_E = np.array(mass, float)
    members = committee.committee(mass_E, share)
    if not mass_E.any():
        assert members == []
        return
    assert mass_E[members].sum() >= share * mass_E.sum() - 1e-9
    for smaller in itertools.combinations(range(len(mass)), len(members) - 1):
        assert mass_E[list(smaller)].sum() < share * mass_E.sum()


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(5, 6))
def test_chance_overlap_is_the_mean_over_all_sets(sizes, n_experts):
    some = [size for size in sizes if size]
    means = []
    for i, size in enumerate(some):
        for other in some[:i]:
            sets = itertools.combinations(range(n_experts), other)
            means.append(np.mean([committee.overlap([*range(size)], [*s]) for s in sets]))
    wanted = pytest.approx(np.mean(means)) if means else None
    assert committee.chance_overlap(sizes, n_experts) == wanted


@given(routings(), st.integers(0, 2**32 - 1))
def test_agreement_and_effective_experts_are_those_of_plain_loops(case, seed):
    ids_LTK, gates_LTK, *_, n_experts = case
    rng = np.random.default_rng(seed)
    other_LTK = rng.permuted(ids_LTK, axis=1)  # of other tokens
    agreement = pairs.agreement(ids_LTK, other_LTK, n_experts)
    number_LT = committee.experts_per_token(gates_LTK)
    for layer, (ids_TK, other_TK) in enumerate(zip(ids_LTK, other_LTK, strict=True)):
        rows = zip(ids_TK.tolist(), other_TK.tolist(), strict=True)
        sets = [({*a} - {n_experts}, {*b}) for a, b in rows]
        chosen = sum(len(own) for own, _ in sets)
        both = sum(len(own & others) for own, others in sets)
        assert agreement[layer] == pytest.approx(both / chosen if chosen else 0)
        for t, gates in enumerate(gates_LTK[layer].astype(float)):
            p = [gate / gates.sum() for gate in gates if gate]
            wanted = math.exp(-sum(x * math.log(x) for x in p)) if p else 0
            assert number_LT[layer, t] == pytest.approx(wanted)


@given(routings(), st.integers(1, 4), st.integers(1, 9))
def test_strongest_uses_are_those_of_a_plain_loop(case, n, apart):
    ids_LTK, gates_LTK, *_ = case
    ids_TK, gates_TK = ids_LTK[0], gates_LTK[0]
    rows = enumerate(zip(ids_TK, gates_TK, strict=True))
    left = {t: gates[ids == 0][0] for t, (ids, gates) in rows if 0 in ids}
    wanted = []
    while left and len(wanted) < n:
        best = max(left, key=left.get)
        wanted.append((best, left[best]))
        left = {t: gate for t, gate in left.items() if abs(t - best) >= apart}
    found = specialisation.strongest_uses(ids_TK, gates_TK, 0, n, apart=apart)
    assert found == [specialisation.Use(t, pytest.approx(gate)) for t, gate in wanted]


@given(routings(), st.integers(1, 4))
def test_favourites_and_domains_are_those_of_plain_sorting(case, n):
    ids_LTK, _, group_T, n_groups, n_experts = case
    table = specialisation.by_vocabulary(ids_LTK, group_T, n_experts, min_count=2)
    share_CE = table.share_LCE[0]
    for expert, found in enumerate(specialisation.favourite_tokens(table, 0, n)):
        rows = zip(share_CE[:, expert], table.counts_C, table.token_ids_C, strict=True)
        order = sorted(rows, key=lambda row: (-row[0], -row[1], row[2]))
        assert found == [(v, share) for share, _, v in order[:n] if share]
    largest = [max(share_E) for share_E in share_CE]
    mean = specialisation.vocabulary_specialisation(table)[0]
    assert mean == (pytest.approx(np.mean(largest)) if largest else None)
    load_GLE = specialisation.load_by_group(ids_LTK, group_T, n_groups, n_experts)
    for expert, found in enumerate(specialisation.distinct_domains(load_GLE)[0]):
        loads = [load_E[0, expert] / max(load_E[0].sum(), 1) for load_E in load_GLE]
        assert found == (loads.index(max(loads)) if any(loads) else None)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_similarities_are_cosines_one_by_one(seed, n_experts, n_tokens):
    rng = np.random.default_rng(seed)
    outputs_ETD = rng.normal(size=(n_experts, n_tokens, 3))
    outputs_ETD[rng.random((n_experts, n_tokens)) < 0.2] = 0
    gate, down = rng.normal(size=(2, n_experts, 2, 3))

    def cosine(a, b):
        norms = np.sqrt((a**2).sum() * (b**2).sum())
        return (a * b).sum() / norms if norms else 0.0

    outputs_EE = pairs.output_similarity(outputs_ETD)
    weights_EE = pairs.weight_similarity(gate, down)
    for i, j in itertools.product(range(n_experts), repeat=2):
        by_token = [cosine(a, b) for a, b in zip(outputs_ETD[i], outputs_ETD[j], strict=True)]
        assert outputs_EE[i, j] == pytest.approx(np.mean(by_token))
        whole = [np.concatenate([gate[k].ravel(), down[k].ravel()]) for k in (i, j)]
        assert weights_EE[i, j] == pytest.approx(cosine(*whole))
    values = {(i, j): outputs_EE[i, j] for j in range(n_experts) for i in range(j)}
    mean = pairs.mean_of_pairs(outputs_EE)
    assert mean == (pytest.approx(np.mean([*values.values()])) if values else None)
    above = {(i, j): value for i, j, value in pairs.alike(outputs_EE, 0.1)}
    assert above == {pair: value for pair, value in values.items() if value > 0.1}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_every_position_is_in_its_range(positions):
    ranges, range_T = specialisation.position_ranges(np.array(positions))
    for position, number in zip(positions, range_T, strict=True):
        first, behind = ranges[number]
        assert first <= position < behind
    assert all(behind in (1, 2 * first) for first, behind in ranges)


class TestKnownAnswers:
    def test_committee_takes_the_heaviest_first_and_the_lower_id_of_equals(self):
        assert committee.committee(np.array([1.0, 3.0, 3.0, 1.0])) == [1, 2]
        assert committee.committee(np.array([1.0, 1.0, 1.0, 1.0])) == [0, 1]
        assert committee.committee(np.zeros(3)) == []

    def test_overlaps(self):
        assert committee.overlap([1, 2], [2, 3]) == pytest.approx(1 / 3)
        assert committee.mean_overlap([[1, 2], [1, 2], []]) == 1.0
        assert committee.mean_overlap([[1], []]) is None
        assert committee.in_every([[3, 1, 2], [2, 3], []]) == [2, 3]
        assert committee.overlaps([[1, 2], [2], []]) == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, None]]

    def test_chance_overlap_is_its_expectation(self):
        # Two sets of 1 of E: the same with probability 1/E.
        assert committee.chance_overlap([1, 1], 4) == pytest.approx(0.25)
        assert committee.chance_overlap([5, 0, 5], 5) == pytest.approx(1.0)
        assert committee.chance_overlap([5, 0], 5) is None

    def test_effective_experts(self):
        gates = np.array([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.0, 0.0, 0.0], [0, 0, 0, 0]]], np.float32)
        assert committee.experts_per_token(gates)[0].tolist() == pytest.approx([4, 1, 0])
        two = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
        assert committee.experts_per_token(np.array([[[0.3, 0.1]]]))[0, 0] == pytest.approx(two)

    def test_each_expert_serves_the_domain_in_which_it_weighs_most(self):
        load_GLE = np.array([[[90, 10, 0]], [[5, 5, 0]]])  # the second domain is ten times smaller
        assert specialisation.distinct_domains(load_GLE) == [[0, 1, None]]

    def test_ranges_of_positions_double(self):
        ranges, range_T = specialisation.position_ranges(np.array([0, 1, 2, 3, 4, 7]))
        assert ranges == [(0, 1), (1, 2), (2, 4), (4, 8)]
        assert range_T.tolist() == [0, 1, 2, 2, 3, 3]

    def test_a_layer_that_looks_at_the_token_alone_is_fully_specialised(self):
        tokens_T = np.repeat([4, 7], 30)
        ids_LTK = np.stack([tokens_T % 3, np.arange(60) % 3])[..., None]
        table = specialisation.by_vocabulary(ids_LTK, tokens_T, 3, min_count=20)
        first, second = specialisation.vocabulary_specialisation(table)
        assert first == 1.0
        assert second == pytest.approx(1 / 3)
        assert specialisation.favourite_tokens(table, 0, 5) == [[], [(4, 1.0), (7, 1.0)], []]

    def test_no_token_is_often_enough(self):
        table = specialisation.by_vocabulary(np.zeros((2, 3, 1), int), np.arange(3), 2, 2)
        assert specialisation.vocabulary_specialisation(table) == [None, None]

    def test_strongest_uses_stand_apart(self):
        ids_TK = np.zeros((6, 1), int)
        gates_TK = np.array([0.1, 0.9, 0.8, 0.2, 0.7, 0.3])[:, None]
        uses = specialisation.strongest_uses(ids_TK, gates_TK, 0, 2, apart=2)
        assert [use.place for use in uses] == [1, 4]
        assert specialisation.strongest_uses(ids_TK, gates_TK, 1, 2) == []

    def test_a_layer_or_expert_that_is_not_there(self):
        ids_LTK = np.zeros((2, 3, 1), int)
        nothing_T = np.zeros(3, int)
        text = RoutedText(*[nothing_T] * 4, ids_LTK, np.ones((2, 3, 1)), 4, ["all"])
        assert len(text.uses(1, 0, 2)) == 2
        with pytest.raises(ValueError, match=r"^layer=2: must be 0 to 1$"):
            text.uses(2, 0, 2)
        with pytest.raises(ValueError, match=r"^expert=-1: must be 0 to 3$"):
            text.uses(0, -1, 2)
        table = specialisation.by_vocabulary(ids_LTK, nothing_T, 4, min_count=1)
        with pytest.raises(ValueError, match=r"^layer=2: must be 0 to 1$"):
            specialisation.favourite_tokens(table, 2, 1)

    def test_agreement_counts_sets_and_no_holes(self):
        ids = np.array([[[0, 1], [2, 4]]])  # of four experts; the second token has a hole
        other = np.array([[[1, 3], [4, 2]]])
        assert pairs.agreement(ids, other, 4) == [pytest.approx(2 / 3)]
        with pytest.raises(ValueError, match="same model and text"):
            pairs.agreement(ids, other[:, :1], 4)

    def test_similar_weights_and_outputs(self):
        rng = np.random.default_rng(0)
        gate, up, down = rng.normal(size=(3, 2, 4, 4))
        gate[1], up[1], down[1] = 2 * gate[0], 2 * up[0], 2 * down[0]
        assert pairs.weight_similarity(gate, up, down) == pytest.approx(np.ones((2, 2)))
        outputs = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]]])
        assert pairs.output_similarity(outputs)[0, 1] == pytest.approx(0.5)  # 0 and 1
        assert pairs.alike(np.array([[1.0, 0.9], [0.9, 1.0]]), 0.85) == [(0, 1, 0.9)]
        assert pairs.alike(np.array([[1.0, 0.8], [0.8, 1.0]]), 0.85) == []
        assert pairs.mean_of_pairs(np.ones((1, 1))) is None

    def test_distinct_experts_are_those_without_a_double(self):
        similarity_EE = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
        assert pairs.distinct(similarity_EE, 0.85) == pytest.approx(1 / 3)
        assert pairs.distinct(np.ones((1, 1)), 0.85) == 1.0


class TestLikenessOfExperts:
    E, F, D = 3, 4, 6

    def weights(self):
        rng = np.random.default_rng(0)
        shapes = (self.E, self.F, self.D), (self.E, self.F, self.D), (self.E, self.D, self.F)
        return [rng.standard_normal(shape) for shape in shapes]

    def test_the_best_order_of_units_is_found(self):
        gate, up, down = self.weights()
        unit = [w / np.linalg.norm(w, axis=-1, keepdims=True) for w in (gate, up)]
        unit.append(np.swapaxes(down / np.linalg.norm(down, axis=1, keepdims=True), 1, 2))

        def alike(a, b):
            g, u, d = (w[0, a] @ w[1, b] for w in unit)
            return (g + u * d) / 2

        best = max(
            np.mean([alike(a, b) for a, b in enumerate(order)])
            for order in itertools.permutations(range(self.F))
        )
        got_EE = pairs.aligned_similarity(gate, up, down)
        assert got_EE[0, 1] == got_EE[1, 0] == pytest.approx(best)
        assert np.diag(got_EE).tolist() == [1, 1, 1]

    def test_the_same_function_in_other_units_is_the_same_expert(self):
        gate, up, down = self.weights()
        order = [2, 0, 3, 1]
        gate[1], up[1], down[1] = gate[0, order], -2 * up[0, order], -3 * down[0][:, order]
        assert pairs.aligned_similarity(gate, up, down)[0, 1] == pytest.approx(1)
        assert pairs.weight_similarity(gate, up, down)[0, 1] < 0.9

    def test_cka_is_that_of_the_unbiased_formula(self):
        """With HSIC_1 of 1310.2059, eq. 6 (by traces and sums of Gram matrices)."""
        outputs_ETD = np.random.default_rng(1).standard_normal((2, 9, 3))

        def hsic(x, y):
            n = len(x)
            k, m = (z @ z.T * (1 - np.eye(n)) for z in (x, y))
            found = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2))
            return (found - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))

        a, b = outputs_ETD
        wanted = hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))
        got_EE = pairs.centred_kernel_alignment(outputs_ETD)
        assert got_EE[0, 1] == pytest.approx(wanted)

    def test_cka_does_not_see_directions_and_scale(self):
        rng = np.random.default_rng(2)
        x_TD = rng.standard_normal((20, 3))
        turned = 5 * x_TD @ np.linalg.qr(rng.standard_normal((3, 3)))[0] + 1
        found_EE = pairs.centred_kernel_alignment(np.stack([x_TD, turned]))
        assert found_EE[0, 1] == pytest.approx(1)


def test_the_surroundings_of_a_token_end_with_its_sequence():
    none_T = np.zeros(7, np.int32)
    none_LTK = np.zeros((1, 7, 1))
    ids_T = np.arange(10, 17)
    text = RoutedText(
        ids_T, np.array([0, 0, 0, 1, 1, 1, 1]), none_T, none_T, none_LTK, none_LTK, 1, ()
    )
    assert text.around(4, 2) == ([13], [15, 16])
    assert text.around(2, 9) == ([10, 11], [])
    assert text.around(0, 1) == ([], [11])

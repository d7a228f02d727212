"""Balance terms against plain numpy written from the papers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import BalanceTerm, Config, MoEConfig, RouterConfig, replace
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.losses import TERMS, Devices
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.moe.schedules import Progress, multiple
from dsmoe_jax.moe.types import RecordedRouting, RouterInputs, Routing
from tests.tools.routing import moe_config as router_config
from tests.tools.routing import route as route_by
from tests.tools.routing import tasks_of

B, S, E, K = 3, 8, 6, 2
D, M = 3, 2  # devices, and how many of them a token may use
SCOPES = ["sequence", "document", "global_batch"]
DEVICES = Devices(D, limit=M)


def random_case(seed, scale=2.0):
    logits = np.random.default_rng(seed).normal(size=(B * S, E), scale=scale).astype(np.float32)
    return logits, jnp.ones((B, S), bool)


def route(logits_TE):
    affinity = jax.nn.softmax(logits_TE, axis=-1)
    gates, ids = jax.lax.top_k(affinity, K)
    return Routing(ids, gates, affinity, jnp.asarray(logits_TE))


def term_value(name, routing, segment_ids_BS, scope, devices=DEVICES):
    """The value of a term over a whole batch."""
    part = losses.sums(name, routing, segment_ids_BS, scope, devices)
    return losses.value(name, part, losses.whole_batch(segment_ids_BS))


def moe_config(**balance):
    """A layer with these balance terms, in this order."""
    return MoEConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        expert_groups=D,
        router=RouterConfig(n_group=D, topk_group=M),
        balance=FrozenDict(balance),
    )


def numpy_expert_balance(s, ids):
    """V1 eqs. 12-14 for the tokens of one scope: s of (T', E), ids of (T', K)."""
    t = len(s)
    f = np.array([E / (K * t) * np.sum(np.any(ids == i, axis=1)) for i in range(E)])
    return np.sum(f * s.mean(axis=0))


@pytest.mark.parametrize("seed", range(3))
def test_expert_balance_by_scope(seed):
    logits, valid = random_case(seed)
    routing = route(logits)
    s, ids = np.asarray(routing.affinity_TE, np.float64), np.asarray(routing.ids_TK)
    whole = numpy_expert_balance(s, ids)
    each = [
        numpy_expert_balance(s[b * S : (b + 1) * S], ids[b * S : (b + 1) * S]) for b in range(B)
    ]
    np.testing.assert_allclose(
        term_value("expert", routing, valid, "global_batch"), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        term_value("expert", routing, valid, "sequence"), np.mean(each), rtol=1e-5
    )
    assert abs(whole - np.mean(each)) > 1e-3  # the scopes are not the same thing


def numpy_device_balance(s, ids):
    """V1 eqs. 15-17: experts 2d and 2d + 1 are on device d."""
    t = len(s)
    f = np.array([E / (K * t) * np.sum(np.any(ids == i, axis=1)) for i in range(E)])
    p = s.mean(axis=0)
    return sum(np.mean(f[[2 * d, 2 * d + 1]]) * np.sum(p[[2 * d, 2 * d + 1]]) for d in range(D))


def numpy_communication_balance(s, ids):
    """V2 eqs. 29-31: each token is sent to a device at most once."""
    total = 0.0
    for d in range(D):
        sent = sum(any(i in (2 * d, 2 * d + 1) for i in row) for row in ids)
        total += D / (M * len(s)) * sent * (s[:, 2 * d] + s[:, 2 * d + 1]).mean()
    return total


def numpy_switch_balance(s, ids):
    """2101.03961 eqs. 4-6, with f by the first choice."""
    f = np.array([np.mean(ids[:, 0] == i) for i in range(E)])
    return E * np.sum(f * s.mean(axis=0))


# The routers that balance terms act on.
BALANCED_BY_TERMS = [name for name, r in ROUTERS.items() if r.learned and not r.balanced]
BY_SCOPE = {
    "expert": numpy_expert_balance,
    "device": numpy_device_balance,
    "communication": numpy_communication_balance,
    "switch": numpy_switch_balance,
}


@pytest.mark.parametrize("skew", [0.0, 4.0])  # of the first three experts: adversarial at 4
@pytest.mark.parametrize("name", list(BY_SCOPE))
def test_terms_against_numpy(name, skew):
    logits, valid = random_case(7)
    routing = route(logits + skew * (np.arange(E) < 3))
    s, ids = np.asarray(routing.affinity_TE, np.float64), np.asarray(routing.ids_TK)
    each = [BY_SCOPE[name](s[b * S : b * S + S], ids[b * S : b * S + S]) for b in range(B)]
    for tokens, want in (("sequence", np.mean(each)), ("global_batch", BY_SCOPE[name](s, ids))):
        got = term_value(name, routing, valid, tokens)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_without_a_bias_or_groups_sequence_balance_is_the_expert_term_of_each_sequence():
    """Whatever the scope of the expert term is."""
    logits, valid = random_case(3)
    want = term_value("expert", route(logits), valid, "sequence")
    assert term_value("sequence", route(logits), valid, "sequence") == want
    terms = {"sequence": BalanceTerm(1e-4), "expert": BalanceTerm(1e-4, "global_batch")}
    sums = losses.layer_sums(route(logits), valid, moe_config(**terms))
    assert losses.value("sequence", sums["sequence"], losses.whole_batch(valid)) == want
    assert losses.value("expert", sums["expert"], losses.whole_batch(valid)) != want


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.balances])
def test_uniform_routing_gives_exactly_one(name):
    """Token t goes to experts t and t + 3 mod 6: all experts, devices and first choices alike."""
    ids = (jnp.arange(B * S)[:, None] + jnp.array([0, E // 2])) % E
    routing = Routing(ids, jnp.full((B * S, K), 1 / E), jnp.full((B * S, E), 1 / E))
    # With 8 tokens a sequence, 16 assignments cannot be even over 6 experts: one of 24 tokens.
    for tokens in SCOPES:
        value = term_value(name, routing, jnp.ones((1, B * S), bool), tokens)
        assert value == pytest.approx(1.0, rel=1e-6)


def test_uneven_devices_cost_more_even_if_no_expert_is_visited_twice():
    """Communication counts visits to a device: two experts on one device are one visit."""
    affinity = jnp.full((D, E), 1 / E)
    apart = Routing(jnp.array([[0, 2], [1, 4], [3, 5]]), jnp.ones((D, K)), affinity)
    together = Routing(jnp.array([[0, 1], [2, 3], [4, 5]]), jnp.ones((D, K)), affinity)
    valid = jnp.ones((1, D), bool)
    for routing, want in ((apart, 1.0), (together, 0.5)):
        value = term_value("communication", routing, valid, "sequence")
        np.testing.assert_allclose(value, want, rtol=1e-6)
        expert = term_value("expert", routing, valid, "sequence")
        np.testing.assert_allclose(expert, 1.0, rtol=1e-6)


def test_a_token_with_fewer_experts_than_devices_reaches_no_more_devices_than_experts():
    """M = 3 devices allowed, K = 2 experts: spread evenly over the devices it still costs 1."""
    ids = jnp.array([[0, 2], [4, 0], [2, 4]])
    routing = Routing(ids, jnp.ones((D, K)), jnp.full((D, E), 1 / E))
    valid, devices = jnp.ones((1, D), bool), Devices(D, limit=D)
    value = term_value("communication", routing, valid, "sequence", devices)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_collapsed_routing_costs_more():
    logits = jnp.zeros((B * S, E)).at[:, :K].set(8.0)
    value = term_value("expert", route(logits), jnp.ones((B, S), bool), "sequence")
    np.testing.assert_allclose(value, E / K, rtol=1e-2)


def test_gradient_flows_through_the_affinities_only():
    logits, valid = random_case(0)

    def value(logits):
        return term_value("expert", route(logits), valid, "global_batch")

    fixed = route(logits)
    f = np.asarray([E / (K * B * S) * np.sum(np.asarray(fixed.ids_TK) == i) for i in range(E)])

    def with_constant_f(logits):
        return (f * jax.nn.softmax(logits, axis=-1).mean(axis=0)).sum()

    got, want = jax.grad(value)(jnp.asarray(logits)), jax.grad(with_constant_f)(jnp.asarray(logits))
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.abs(got).max() > 1e-4


def documents():
    """Segment ids, and a mask of each document: rows of two, one and three, two with padding."""
    segment_ids_BS = np.zeros((B, S), np.int32)
    segment_ids_BS[0] = [1, 1, 1, 2, 2, 2, 2, 2]
    segment_ids_BS[1, :5] = 1
    segment_ids_BS[2, :7] = [1, 2, 2, 2, 3, 3, 3]
    numbers_BS = np.where(segment_ids_BS > 0, 10 * np.arange(B)[:, None] + segment_ids_BS, 0)
    return segment_ids_BS, [numbers_BS.reshape(-1) == n for n in np.unique(numbers_BS) if n]


@pytest.mark.parametrize("name", list(BY_SCOPE))
def test_each_document_by_itself(name):
    """The mean over six documents of the paper's formula for the tokens of each."""
    logits, _ = random_case(9)
    routing = route(logits)
    segment_ids_BS, of_documents = documents()
    s, ids = np.asarray(routing.affinity_TE, np.float64), np.asarray(routing.ids_TK)
    assert len(of_documents) == 6
    want = np.mean([BY_SCOPE[name](s[tokens], ids[tokens]) for tokens in of_documents])
    got = term_value(name, routing, jnp.asarray(segment_ids_BS), "document")
    np.testing.assert_allclose(got, want, rtol=1e-5)
    by_row = term_value(name, routing, jnp.asarray(segment_ids_BS), "sequence")
    assert abs(by_row - want) > 1e-2


@pytest.mark.parametrize("name", list(TERMS))
def test_two_documents_in_a_row_are_those_of_two_rows(name):
    """Value and gradient: no other document of a row matters."""
    logits = np.random.default_rng(10).normal(size=(S, E), scale=2).astype(np.float32)
    together = jnp.asarray([[1] * 3 + [2] * (S - 3)])
    apart = jnp.asarray([[1] * 3 + [0] * (S - 3), [0] * 3 + [1] * (S - 3)])

    @jax.jit
    @jax.value_and_grad
    def term(logits, segment_ids_BS):
        return term_value(name, route(logits), segment_ids_BS, "document")

    got, got_grad = term(logits, together)
    want, grads = term(np.tile(logits, (2, 1)), apart)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(got_grad, grads[:S] + grads[S:], rtol=1e-5, atol=1e-7)
    assert np.abs(got_grad).max() > 1e-2


def test_a_document_is_counted_exactly_behind_a_long_one():
    """The last two of 5000 tokens, each a document: f is a difference of sums of thousands."""
    s, e, k = 5000, 7, 3  # 7/3 is no float32, nor are its multiples
    ids_TK = (np.arange(s)[:, None] + np.arange(k)) % e
    affinity_TE = np.full((s, e), 1 / e, np.float32)
    affinity_TE[-2:] = np.eye(e)[ids_TK[-2:, 0]]
    routing = Routing(jnp.asarray(ids_TK), jnp.ones((s, k)), jnp.asarray(affinity_TE))
    segment_ids_BS = np.ones((1, s), np.int32)
    segment_ids_BS[0, -2:] = 2, 3
    got = term_value("expert", routing, jnp.asarray(segment_ids_BS), "document")
    np.testing.assert_allclose(got, (1 + 7 / 3 + 7 / 3) / 3, rtol=2e-6)


def numpy_sequence_balance(s, k):
    """V3 eqs. 17-20 for the tokens of one sequence: f by the K largest plain scores."""
    t, e = s.shape
    best = np.argsort(-s, axis=1, kind="stable")[:, :k]
    f = np.array([e / (k * t) * np.sum(np.any(best == i, axis=1)) for i in range(e)])
    normalised = s / s.sum(axis=1, keepdims=True)
    return np.sum(f * normalised.mean(axis=0)), f, normalised


@pytest.mark.parametrize("changed", ["nothing", "bias", "groups", "bias and groups"])
def test_sequence_balance_counts_the_best_plain_scores(changed):
    """V3 eqs. 17-20, value and gradient, whatever a bias and groups make of the choice."""
    logits = np.random.default_rng(11).normal(size=(B * S, E)).astype(np.float32)
    section = {"scoring_func": "sigmoid", "norm_topk_prob": True}
    inputs = RouterInputs(jnp.zeros(B * S, jnp.int32))
    if "bias" in changed:
        section["bias_update_speed"] = 1e-3
        inputs = inputs._replace(state={"bias_E": jnp.linspace(-0.4, 0.4, E)})
    if "groups" in changed:
        section |= {"n_group": 3, "topk_group": 1}
    moe = router_config(e=E, k=K, **section)

    def value(logits, name):
        found = route_by(logits, inputs, moe)
        return term_value(name, found, jnp.ones((B, S), bool), "sequence"), found

    (got, routing), grad = jax.value_and_grad(value, has_aux=True)(jnp.asarray(logits), "sequence")
    z = logits.astype(np.float64).reshape(B, S, E)
    each = [numpy_sequence_balance(1 / (1 + np.exp(-z_b)), K) for z_b in z]
    np.testing.assert_allclose(got, np.mean([term for term, *_ in each]), rtol=1e-5)
    # d/dz of sum_i f_i mean_t s'_ti, with s' = s / sum s and ds/dz = s (1 - s).
    want = [p * (f - (f * p).sum(axis=1, keepdims=True)) for _, f, p in each]
    want = np.array(want) / (1 + np.exp(z)) / (B * S)
    np.testing.assert_allclose(grad, want.reshape(-1, E), rtol=1e-4, atol=1e-8)
    chosen = np.sort(np.asarray(routing.ids_TK), axis=1)
    best = np.sort(np.argsort(-logits, axis=1)[:, :K], axis=1)
    expert, _ = value(jnp.asarray(logits), "expert")
    if changed == "nothing":
        np.testing.assert_array_equal(chosen, best)
        assert expert == got
    else:
        assert (chosen != best).any(axis=1).mean() > 0.2
        assert abs(expert - got) > 1e-3  # the choice itself is counted by the expert term


@pytest.mark.parametrize("router", BALANCED_BY_TERMS)
def test_an_even_sure_router_gives_one(router):
    """In training, with all that a router leaves out at random: as many choices as f divides by."""
    k, t = ROUTERS[router].top or K, 2 * E
    ids = (np.arange(t)[:, None] + E // 2 * np.arange(k)) % E
    logits = np.full((t, E), -40.0, np.float32)
    np.put_along_axis(logits, ids, np.linspace(40, 34, k, dtype=np.float32)[None], axis=1)
    per_expert = ROUTERS[router].logits_per_expert
    if router == "noisy_topk":  # the noise's scale beside the logits
        logits = np.concatenate([logits, np.full_like(logits, -40)], axis=1)
    elif per_expert > 1:
        logits = np.repeat(logits, per_expert, axis=1)
    options = {o: True for o in ROUTERS[router].options if o == "random_second_expert"}
    moe = router_config(router, e=E, k=k, options=options, tasks=tasks_of(router))
    ids_TK = jnp.asarray(ids, jnp.int32)
    replayed = RecordedRouting(ids_TK, jnp.ones((t, k)), ids_TK, ids_TK)
    inputs = RouterInputs(jnp.zeros(t, jnp.int32), rng=jax.random.key(0), replayed=replayed)
    routing = route_by(jnp.asarray(logits), inputs, moe)
    if options:
        assert (routing.ids_TK[:, 1] == E).sum() > t / 2, "most second ones are left out"
    terms = {name: term for name, term in TERMS.items() if term.balances}
    for name, term in terms.items():
        for scope in term.scopes:
            value = term_value(name, routing, jnp.ones((1, t), bool), scope)
            np.testing.assert_allclose(value, 1.0, rtol=1e-5, err_msg=f"{name} in scope {scope}")


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("tokens", SCOPES)
def test_padding_counts_nowhere(name, tokens):
    """A padded batch (with a sequence that is all padding) equals the batch without padding."""
    logits, _ = random_case(1)
    short = logits.reshape(B, S, E)[:2, :5].reshape(-1, E)
    want = term_value(name, route(short), jnp.ones((2, 5), bool), tokens)
    valid = jnp.zeros((B, S), bool).at[:2, :5].set(True)
    got = term_value(name, route(logits), valid, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_router_z_is_the_mean_squared_logsumexp():
    logits, _ = random_case(2)
    valid = np.ones((B, S), bool)
    valid[0, 3:] = False
    z_BS = (np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)) ** 2).reshape(B, S)
    by_sequence = np.mean([z_BS[0, :3].mean(), *z_BS[1:].mean(axis=1)])
    for tokens, want in (("sequence", by_sequence), ("global_batch", z_BS[valid].mean())):
        got = term_value("router_z", route(logits), jnp.asarray(valid), tokens)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("tokens", SCOPES)
def test_values_of_parts_add_up(name, tokens):
    """A batch in three parts of a sequence each, one of them padded, one nothing but padding."""
    logits, _ = random_case(5)
    routing = route(logits)
    segment_ids = jnp.ones((B, S), int).at[0, 3:].set(2).at[1, 4:].set(0).at[2].set(0)
    parts = []
    for b in range(B):
        own = jax.tree.map(lambda x, b=b: x[b * S : b * S + S], routing)
        parts.append(losses.sums(name, own, segment_ids[b : b + 1], tokens, DEVICES))
    sent = None if parts[0].sent_G is None else {name: sum(part.sent_G for part in parts)}
    whole = losses.whole_batch(segment_ids, sent)
    got = sum(losses.value(name, part, whole) for part in parts)
    np.testing.assert_allclose(got, term_value(name, routing, segment_ids, tokens), rtol=1e-6)


def test_each_term_has_its_own_scope():
    logits, valid = random_case(4)
    balance = {"expert": BalanceTerm(0.01), "device": BalanceTerm(0.1, "global_batch")}
    sums = losses.layer_sums(route(logits), valid, moe_config(**balance))
    assert set(sums) == set(balance)
    for name, tokens in (("expert", "sequence"), ("device", "global_batch")):
        got = losses.value(name, sums[name], losses.whole_batch(valid))
        assert got == term_value(name, route(logits), valid, tokens)


def test_what_is_counted_over_the_batch():
    """Terms of that scope, but for those that count nothing."""
    by_batch = {name: BalanceTerm(0.1, "global_batch") for name in TERMS}
    assert losses.counted_over_batch(by_batch) == [n for n in TERMS if n != "router_z"]
    assert losses.counted_over_batch({name: BalanceTerm(0.1) for name in TERMS}) == []
    mixed = {"device": BalanceTerm(0.1, "global_batch"), "expert": BalanceTerm(0.01)}
    assert losses.counted_over_batch(mixed) == ["device"]


def test_weights_follow_their_schedules():
    """Against numpy's interpolation; two pairs with the same share are a jump."""
    ramp, stairs = ((0.1, 0.0), (0.5, 2.0)), ((0.5, 1.0), (0.5, 0.25))
    balance = {
        "expert": BalanceTerm(0.01, schedule=ramp),
        "router_z": BalanceTerm(0.5, schedule=stairs),
        "switch": BalanceTerm(0.3),
    }
    for share in (0.0, 0.1, 0.2, 0.4999, 0.5, 0.9, 1.0):
        step = round(share * 10_000)
        got = losses.weights_at(balance, Progress(jnp.int32(step), 10_000))
        want = 0.01 * np.interp(share, [0.1, 0.5], [0.0, 2.0])
        np.testing.assert_allclose(got["expert"], want, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(got["router_z"], 0.5 if share < 0.5 else 0.125, rtol=1e-6)
        np.testing.assert_allclose(got["switch"], 0.3, rtol=1e-6)
        assert set(got) == {"expert", "router_z", "switch"}


@pytest.mark.parametrize("steps", [49, 100, 7000])
def test_a_jump_is_at_the_step_at_its_share(steps):
    """Not one later where the share is rounded up, or step / steps down."""
    shares = (0.07, 0.09, 0.15, 0.29, 0.33, 0.6, 0.72, 0.85, 0.97)
    firsts = [math.ceil(round(100 * share) * steps / 100) for share in shares]

    @jax.jit
    def multiples(step_n):
        jumps = [((0, 1), (share, 1), (share, 0), (1, 0)) for share in shares]
        return [
            multiple(jump, Progress(step, steps)) for jump, step in zip(jumps, step_n, strict=True)
        ]

    first_n = jnp.array(firsts)
    assert multiples(first_n - 1) == [1] * len(shares)
    assert multiples(first_n) == [0] * len(shares)


def test_the_terms_are_those_of_the_config():
    """The default is the expert term; None takes one out, a factor of 0 keeps it at no weight."""

    def weights(**changes):
        balance = replace(Config(), **changes).model.moe.balance
        return losses.weights_at(balance, Progress(jnp.int32(5), 10))

    assert weights() == {"expert": np.float32(0.01)}
    assert weights(**{"model.moe.balance.expert": None}) == {}
    assert weights(**{"model.moe.balance.expert.factor": 0}) == {"expert": 0.0}
    both = weights(**{"model.moe.balance.router_z.factor": 1e-3})
    assert both == {"expert": np.float32(0.01), "router_z": np.float32(1e-3)}
    for name in TERMS:  # every term has its weight, scope and schedule in the config
        key = f"model.moe.balance.{name}"
        fades = {f"{key}.factor": 2.0, f"{key}.schedule": ((0, 1), (1, 0))}
        assert weights(**fades, **{f"{key}.scope": "sequence"})[name] == 1.0


def test_the_order_of_terms_is_not_that_of_the_config():
    """So that their sum is the same float however a config was written."""
    terms = {"router_z": 0.5, "expert": 0.01, "switch": 0.3, "device": 0.05}
    wanted = ["expert", "device", "switch", "router_z"]
    logits, valid = random_case(8)
    for names in itertools.permutations(terms):
        moe = moe_config(**{name: BalanceTerm(terms[name], "global_batch") for name in names})
        assert list(losses.in_order(moe.balance)) == wanted
        assert list(losses.weights_at(moe.balance, Progress(jnp.int32(0), 10))) == wanted
        assert losses.counted_over_batch(moe.balance) == wanted[:3]
    assert list(losses.layer_sums(route(logits), valid, moe)) == wanted


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        (
            "topk",
            {"balance.sequence.factor": 1e-4, "balance.sequence.scope": "global_batch"},
            r"model\.moe\.balance\.sequence\.scope='global_batch': must be one of"
            r" \('sequence', 'document'\)",
        ),
        ("topk", {"balance.expert.scope": "batch"}, r"expert\.scope='batch': must be one of"),
        (
            "topk",
            {"balance.expret.factor": 0.1},
            r"expret\.factor=0\.1: no such balance term; did you mean expert\?",
        ),
        ("topk", {"balance.x.factor": 0.1}, r"no such balance term; the terms are expert, device,"),
        (
            "topk",
            {"balance.device.factor": 0.1},
            r"device\.factor=0\.1: .*one device; model\.moe\.expert_groups must be > 1",
        ),
        (
            "topk",
            {"balance.communication.factor": 0.1, "expert_groups": 3},
            r"communication\.factor=0\.1: .*expert_groups=3 must equal n_group=1",
        ),
        ("hash", {}, r"expert\.factor=0\.01: the hash router has no .*balance\.expert=None"),
        ("expert_choice", {}, r"expert\.factor=0\.01: the expert_choice router has no affinities"),
        (
            "uniform",
            {"balance.expert": None, "balance.router_z.factor": 0.1},
            r"router_z\.factor=0\.1: the uniform router has no",
        ),
    ],
)
def test_terms_that_cannot_be_are_refused(router, changes, message):
    def build():
        moe = replace(Config(), **{f"model.moe.{k}": v for k, v in changes.items()}).model.moe
        line = ROUTERS[router]
        losses.check(moe, router, learned=line.learned, balanced=line.balanced)

    with pytest.raises(ValueError, match=message):
        build()


def test_a_router_whose_load_is_even_may_still_have_a_z_loss():
    """It pulls at the logits, not at the load."""
    for name in ("base", "expert_choice"):
        moe = moe_config(router_z=BalanceTerm(1e-3))
        losses.check(moe, name, learned=ROUTERS[name].learned, balanced=ROUTERS[name].balanced)

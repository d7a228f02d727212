"""Generation with a draft: the tokens of plain greedy generation, and the drafts that are right."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.model.sampling import generate
from dsmoe_jax.model.speculative import generate_drafted
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from tests.model.tiny_model import V, config_of, make

DEPTH, P, G = 2, 3, 12
SIZES = {
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.mtp.num_nextn_predict_layers": DEPTH,
    "model.initializer_range": 0.5,
}
PROMPTS = jax.random.randint(jax.random.key(3), (2, P), 0, V)


@pytest.fixture(scope="module")
def model():
    return make(**SIZES)


@pytest.fixture(scope="module")
def greedy(model):
    return np.asarray(generate(model, PROMPTS, G))


@pytest.fixture(scope="module")
def drafted(model):
    return generate_drafted(model, PROMPTS, G)


def test_tokens_are_those_of_greedy_generation(drafted, greedy):
    np.testing.assert_array_equal(drafted.tokens_BG, greedy)
    # A draft of a model that was never trained is right by chance.
    assert (drafted.proposed == 2 * drafted.passes).all()
    assert 0 <= drafted.acceptance < 0.5


def test_a_draft_that_is_always_right_saves_passes(model):
    """Representation and embedding of the next token are handed through: the model's own head.

    With a model whose next token depends on the last one alone, module k finds the token k + 1
    ahead from the embedding of the token k ahead.
    """
    copy = nnx.clone(model)
    for block in (copy.layers, copy.mtp.block):
        for weight in (block.attention.out_DNH, block.moe.down_EDF, block.moe.shared.down_DF):
            weight[...] = 0 * weight[...]
    d = copy.config.hidden_size
    takes_embedding = jnp.concatenate([jnp.eye(d), jnp.zeros((d, d))], axis=1)
    copy.mtp.projection_DJ[...] = jnp.stack([takes_embedding] * DEPTH)
    wanted = np.asarray(generate(copy, PROMPTS, G))
    found = generate_drafted(copy, PROMPTS, G)
    np.testing.assert_array_equal(found.tokens_BG, wanted)
    assert found.acceptance == 1.0
    # The prompt gives the first token, each pass 1 + DEPTH more.
    assert found.passes == -(-(G - 1) // (1 + DEPTH))


def test_the_draft_is_what_training_predicts(model, greedy, drafted):
    """Drafted tokens that were accepted in turn: by the modules on the whole text at once."""
    tokens_BS = jnp.concatenate([PROMPTS, greedy], axis=1)
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})
    def agrees(state):
        scored = nnx.merge(graph, state).score(
            ModelInputs(tokens_BS), tokens_BS, interventions.GENERATION, look_ahead=True
        )
        return scored.ahead.agrees_KBS

    agrees_KBS = np.asarray(agrees(state))
    # The walk of generation: at each place as many drafts as agree in turn, in all sequences.
    at, passes, accepted = P - 1, 0, np.zeros(DEPTH, int)
    while at + 1 < P + G - 1:
        kept_KB = np.cumprod(agrees_KBS[:, :, at], axis=0)
        accepted += kept_KB.sum(axis=1)
        at += 1 + kept_KB.min(axis=1).sum()
        passes += 1
    assert passes == drafted.passes
    np.testing.assert_array_equal(accepted, drafted.accepted)


def test_impossible_drafts_are_refused(model):
    without = types.SimpleNamespace(config=config_of().model)
    with pytest.raises(ValueError, match=r"model\.mtp=None: there is no draft"):
        generate_drafted(without, PROMPTS, 1)
    with pytest.raises(ValueError, match="max_new_tokens=0: must be > 0"):
        generate_drafted(model, PROMPTS, 0)

"""Generation with a draft: the tokens of plain greedy generation, and the drafts that are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.model import speculative
from dsmoe_jax.model.generation import generate, prompt_inputs
from dsmoe_jax.model.speculative import generate_drafted
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from tests.model.tiny_model import V, make

DEPTH, P, G = 2, 3, 12
SIZES = {
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.mtp.num_nextn_predict_layers": DEPTH,
    "model.initializer_range": 0.5,
}
UNEQUAL = [[9, 8, 7], [4, 5, 5, 1, 2]]
PROMPTS = jax.random.randint(jax.random.key(3), (2, P), 0, V)


@pytest.fixture(scope="module")
def model():
    """One whose best token is one of four, so that drafts are often right."""
    model = make(**SIZES)
    model.head_VD[...] = model.head_VD[...].at[3:].set(0.0)
    return model


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, UNEQUAL, G).tokens_BG


def test_tokens_are_those_of_greedy_generation(model, greedy):
    found = generate_drafted(model, UNEQUAL, G)
    np.testing.assert_array_equal(found.tokens_BG, greedy)
    assert found.prompt_tokens == 3 + 5
    # A draft of a model that was never trained is right by chance: not 0, not 1.
    assert (found.proposed == 2 * found.passes).all()
    assert 0 < found.acceptance < 1


def handing_through(model, attention):
    """A copy whose next token depends on the last one alone; a module finds it from the embedding.

    Representation and embedding of the next token are handed through to the model's own head.

    Args:
      model: with modules.
      attention: how much of the modules' attention is left, which spoils their drafts.
    """
    copy = nnx.clone(model)
    for block, kept in ((copy.layers, 0.0), (copy.mtp.block, attention)):
        block.attention.out_DNH[...] = kept * block.attention.out_DNH[...]
        for weight in (block.moe.down_EDF, block.moe.shared.down_DF):
            weight[...] = 0 * weight[...]
    d = copy.config.hidden_size
    takes_embedding = jnp.concatenate([jnp.eye(d), jnp.zeros((d, d))], axis=1)
    copy.mtp.projection_DJ[...] = jnp.stack([takes_embedding] * DEPTH)
    return copy


def test_a_draft_that_is_always_right_saves_passes(model):
    copy = handing_through(model, attention=0.0)
    wanted = generate(copy, PROMPTS, G).tokens_BG
    found = generate_drafted(copy, PROMPTS, G)
    np.testing.assert_array_equal(found.tokens_BG, wanted)
    assert found.acceptance == 1.0
    # The prompt gives the first token, each pass 1 + DEPTH more.
    assert found.passes == -(-(G - 1) // (1 + DEPTH))


def test_the_draft_is_what_training_predicts(model):
    """Drafted tokens that were accepted in turn: by the modules on the whole texts at once."""
    model = handing_through(model, attention=0.3)
    greedy = generate(model, UNEQUAL, G).tokens_BG
    found = generate_drafted(model, UNEQUAL, G)
    assert 0 < found.acceptance < 1
    longest = max(map(len, UNEQUAL))
    tokens_BS = jnp.array(
        [[*p, *g, *[0] * (longest - len(p))] for p, g in zip(UNEQUAL, greedy, strict=True)]
    )
    targets_BS = jnp.roll(tokens_BS, -1, axis=1)
    scored = model.score(
        ModelInputs(tokens_BS), targets_BS, interventions.GENERATION, look_ahead=True
    )
    agrees_KBS = np.asarray(scored.ahead.agrees_KBS)
    # The walk of generation: at each place as many drafts as agree in turn in both texts.
    walked, passes, accepted = 0, 0, np.zeros(DEPTH, int)
    while walked + 1 < G:
        kept_BK = np.array(
            [np.cumprod(agrees_KBS[:, i, len(p) - 1 + walked]) for i, p in enumerate(UNEQUAL)]
        )
        accepted += kept_BK.sum(axis=0)
        walked += 1 + kept_BK.sum(axis=1).min()
        passes += 1
    assert passes == found.passes
    np.testing.assert_array_equal(accepted, found.accepted)


@pytest.mark.parametrize("attention", [0.0, 0.3])
def test_the_modules_remember_the_text_as_it_is(model, attention):
    """Whether drafts are kept (no attention) or not, their cache is that of the final text.

    It decides nothing but drafts, and those are right or wrong for other reasons too.
    """
    copy = handing_through(model, attention)
    inputs, allowed_V = prompt_inputs(UNEQUAL, V), jnp.ones(V, bool)
    done, _ = speculative._run(copy, inputs, allowed_V, G)
    b, length = done.tokens_BL.shape
    again = done._replace(draft_cache=copy.empty_draft_cache(b, length))
    wanted = speculative._Drafting(copy, allowed_V)._draft(again, 0, length - DEPTH)
    for found, want in zip(done.draft_cache.stacked, wanted.draft_cache.stacked, strict=True):
        for k in range(DEPTH):  # at the last k positions this module looked at drafts
            known = slice(0, int(done.last) - 1 - k)
            np.testing.assert_allclose(found[k, :, known], want[k, :, known], atol=1e-5)


def test_a_model_without_modules_is_refused():
    with pytest.raises(ValueError, match=r"model\.mtp=None: there is no draft"):
        generate_drafted(make(), PROMPTS, 1)

"""The rotary position embedding against complex numbers; its scalings against Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import AttentionConfig, RopeScaling
from dsmoe_jax.nn.attention.rope import amplitude, check, frequencies, rotate, score_factor


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-3), ("bfloat16", 0.03)])
def test_rotation_far_into_a_document(dtype, atol, interleaved):
    """Pairs as complex numbers, times e^(i position theta^(-2i/H)); bfloat16 has no 1001."""
    config = AttentionConfig(rope_interleaved=interleaved)
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8)).astype(dtype)
    got = rotate(x, jnp.array([[1001, 4095]]), config)
    assert got.dtype == dtype
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    pairs = np.asarray(a, np.float64) + 1j * np.asarray(b, np.float64)
    angle = np.array([1001, 4095])[:, None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


def number(low, high):
    return st.floats(low, high, width=32)


@st.composite
def scalings(draw):
    """A scaling of any type."""
    name = draw(st.sampled_from(["linear", "llama3", "yarn"]))
    drawn = {"rope_type": name, "factor": draw(number(1, 64))}
    if name != "linear":
        drawn["original_max_position_embeddings"] = draw(st.integers(8, 100_000))
    if name == "llama3":
        low = drawn["low_freq_factor"] = draw(number(0.5, 4))
        drawn["high_freq_factor"] = low + draw(number(0.5, 8))
    if name == "yarn":
        slow = drawn["beta_slow"] = draw(number(0.5, 4))
        drawn["beta_fast"] = slow + draw(number(0.5, 60))
        drawn["truncate"] = draw(st.booleans())
        for field in ("mscale", "mscale_all_dim", "attention_factor"):
            drawn[field] = draw(st.none() | number(0.125, 2))
    return drawn


@settings(max_examples=25)
@given(scalings(), st.sampled_from([8, 64]), number(100, 1e6))
def test_frequencies_and_scales_are_those_of_hugging_face(drawn, size, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    given_to_them = {key: value for key, value in drawn.items() if value is not None}
    theirs = transformers.LlamaConfig(
        head_dim=size, rope_parameters={**given_to_them, "rope_theta": theta}
    )
    want, factor = ROPE_INIT_FUNCTIONS[drawn["rope_type"]](theirs, "cpu")
    scaling = RopeScaling(**drawn)
    config = AttentionConfig(rope_theta=theta, rope_scaling=scaling)
    check(config)
    got = frequencies(size, config)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=5e-6)
    assert amplitude(scaling) == pytest.approx(factor)
    assert score_factor(scaling) == pytest.approx(yarn_apply_mscale(drawn, 1.0))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk"}, r"rope_type='ntk': must be one of \['linear', 'llama3', 'yarn'\]"),
        (
            {},
            "original_max_position_embeddings=None: the rope type yarn needs a number",
        ),
        (
            {"rope_type": "linear", "mscale": 1.0},
            "mscale=1.0: the rope type linear does not know it; must be None",
        ),
        (
            {"original_max_position_embeddings": 9, "beta_fast": 1.0},
            r"beta_fast=1.0: must be above beta_slow=1.0",
        ),
        (
            {
                "rope_type": "llama3", "original_max_position_embeddings": 9,
                "low_freq_factor": 4.0, "high_freq_factor": 1.0,
            },
            r"high_freq_factor=1.0: must be above low_freq_factor=4.0",
        ),
        ({"factor": 0.5}, "factor=0.5: must be at least 1"),
        ({"mscale_all_dim": 0.0}, "mscale_all_dim=0.0: must be > 0"),
    ],
)  # fmt: skip
def test_refused(scaling, message):
    with pytest.raises(ValueError, match=rf"^model\.attention\.rope_scaling\.{message}$"):
        check(AttentionConfig(rope_scaling=RopeScaling(**{"factor": 4.0, **scaling})))

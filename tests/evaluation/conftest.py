"""A random model of transformers, and the same one converted."""

import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.progress import Silent
from tests.tools.tiny import tiny


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus):
    return Tokenizer.load(tiny_corpus / "tokenizer.json")


@pytest.fixture(scope="module")
def theirs():
    """A random model of transformers, large enough in its weights to have opinions."""
    import torch  # most tests need not wait for the two
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "olmoe", vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        attn_implementation="eager", pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def converted(theirs, tmp_path_factory):
    """Its config and arrays as ours."""
    from dsmoe_jax.hf import loading

    directory = tmp_path_factory.mktemp("olmoe")
    theirs.save_pretrained(directory)
    source = loading.open_source(directory)
    config = replace(tiny(), model=source.config, **{"model.moe.expert_backend": "loop"})
    return config, loading.load_state(source, Silent())

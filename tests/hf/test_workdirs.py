"""A run -> Hugging Face -> a workdir: the same bits; tokenizers go along; what a workdir is for."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import transformers
from against_transformers import draw
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers

from dsmoe_jax.analysis.routed_text import route_text
from dsmoe_jax.data.tokenizer import END_OF_TEXT, PAD
from dsmoe_jax.hf import loading, workdirs
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.runs.loading import load_model_state, load_run, load_writer
from dsmoe_jax.runs.saved_arrays import SavedArrays
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.training.start import from_run
from tests.tools.trees import by_path


def state_of(workdir, step=None):
    return load_model_state(workdir, model_shapes(read_config(workdir).model), step).state


def assert_same_bits(found, wanted):
    found, wanted = by_path(found), by_path(wanted)
    assert sorted(found) == sorted(wanted)
    for path, x in wanted.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


@pytest.fixture(scope="module")
def converted(finished_run, tmp_path_factory):
    """A run, as Hugging Face's, and as a workdir again."""
    directory = tmp_path_factory.mktemp("converted")
    run = finished_run[0]
    written = workdirs.to_hf(str(run), str(directory / "hf"), None, "float32", 10**9)
    assert (written.architecture, written.step) == ("DeepseekForCausalLM", 10)
    workdirs.from_hf(str(directory / "hf"), str(directory / "back"))
    return run, directory / "hf", directory / "back"


def test_the_same_bits(converted):
    run, _, back = converted
    assert_same_bits(state_of(run), state_of(back))
    assert read_config(back).model.moe.router == read_config(run).model.moe.router


def test_it_is_looked_into_like_the_run(converted):
    """Text comes from elsewhere; its experts are those of the run."""
    run = load_run(converted[0])
    found, wanted = (
        route_text(model, run.corpus, max_tokens=300, batch_size=4)
        for model in (load_writer(converted[2]).model, run.model)
    )
    np.testing.assert_array_equal(found.ids_LTK, wanted.ids_LTK)
    # Another program, so the last bit may differ.
    np.testing.assert_allclose(found.gates_LTK, wanted.gates_LTK, rtol=1e-5)


def test_a_step(finished_run, tmp_path):
    workdirs.to_hf(str(finished_run[0]), str(tmp_path / "hf"), 9, "float32", 10**9)
    source = loading.open_source(tmp_path / "hf")
    embedding = source.checkpoint.read("model.embed_tokens.weight", (slice(None), slice(None)))
    there = state_of(finished_run[0], step=9)
    np.testing.assert_array_equal(there.params["embedding_VD"][...], embedding)


def test_the_tokenizer_goes_along(converted):
    run, hugging_face, back = converted
    theirs = transformers.AutoTokenizer.from_pretrained(hugging_face)
    writer = load_writer(back)
    text = "def ünter(x):\n    return x"
    assert theirs.encode(text, add_special_tokens=False) == writer.tokenizer.encode(text)
    assert theirs.eos_token_id == writer.tokenizer.eos_id
    assert (back / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"^data\.corpus=None: .*--corpus"):
        load_run(back)


def test_a_training_begins_with_it(converted, tiny_config):
    from dsmoe_jax.data.opening import open_corpus

    config = tiny_config(**{"train.start_from": str(converted[2])})
    begun = from_run(config, open_corpus(config.data))
    assert_same_bits(begun.params, state_of(converted[0]).params)


def byte_level(directory, tokens, **settings):
    """A tokenizer that knows bytes and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Bpe(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(tokens))
    bpe.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def llama(tmp_path):
    """A model of 260 ids."""
    draw("llama", intermediate_size=24, vocab_size=260).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_another_end_of_text_keeps_its_id(llama, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    byte_level(
        llama,
        ["<begin>", "<end>", "<pad>"],
        eos_token={"__type": "AddedToken", "content": "<end>"},
        pad_token="<pad>",
        chat_template=template,
    )
    workdirs.from_hf(str(llama), str(tmp_path / "workdir"))
    tokenizer = load_writer(tmp_path / "workdir").tokenizer
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (257, 258, 259)
    assert tokenizer.token(257) == END_OF_TEXT
    assert tokenizer.token(258) == PAD
    assert tokenizer.encode("<end>") != [257]
    workdirs.to_hf(str(tmp_path / "workdir"), str(tmp_path / "back"), None, "bfloat16", 10**9)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == template
    tree = json.loads((tmp_path / "back" / "config.json").read_text())
    assert tree["max_position_embeddings"] == 2048
    assert tree["dtype"] == "bfloat16"


def test_without_a_tokenizer(llama, tmp_path, capsys):
    workdirs.from_hf(str(llama), str(tmp_path / "workdir"))
    assert "has no tokenizer.json: text cannot be generated or measured" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"tokenizer\.json: there is none"):
        load_writer(tmp_path / "workdir")
    assert len(jax.tree.leaves(state_of(tmp_path / "workdir"))) == 12


def test_without_room_for_padding(llama, tmp_path, capsys):
    byte_level(llama, ["<begin>", "<end>", "<third>", "<fourth>"], eos_token="<end>")
    workdirs.from_hf(str(llama), str(tmp_path / "workdir"))
    assert f"no id is free for {PAD}" in capsys.readouterr().err
    assert not (tmp_path / "workdir" / "tokenizer.json").exists()


def test_interrupted_or_damaged_nothing_is_left(converted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(converted[0], run)
    place = tmp_path / "hf"
    read = SavedArrays.read
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(SavedArrays, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workdirs.to_hf(str(run), str(place), 10, "float32", 10**5)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == [run]
    meta = next((run / "checkpoints" / "10" / "meta").rglob("metadata"))
    tree = json.loads(meta.read_text())
    tree["digests"]["model"][3] += 1
    meta.write_text(json.dumps(tree))
    (run / "checkpoints" / "10" / "files.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(an array is not what was saved\)"):
        workdirs.to_hf(str(run), str(place), 10, "float32", 10**5)
    assert sorted(tmp_path.iterdir()) == [run]

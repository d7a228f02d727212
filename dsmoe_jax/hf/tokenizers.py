"""The tokenizer of a Hugging Face model: as one of ours, and carried along as it is.

Ours has `<|endoftext|>` between documents.  A tokenizer that calls its end of text otherwise gets
that name for the same id, so that the model's own embedding stands for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsmoe_jax.data.tokenizer import END_OF_TEXT, PAD, Tokenizer
from dsmoe_jax.runs import json_files

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
# All that belongs to a model beside its weights; what is not there is not carried.
CARRIED = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def carry(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    """Copies the files of a model that are not weights; makes the directory if it is missing."""
    target.mkdir(exist_ok=True)
    for name in CARRIED:
        if name not in without and (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def write(tokenizer: Path, target: Path) -> None:
    """Writes a tokenizer of ours in the form that transformers loads.

    Args:
      tokenizer: its file.
      target: the directory of the model.
    """
    (target / TOKENIZER).write_bytes(tokenizer.read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,  # the model reads it before every document
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    json_files.write(target / SETTINGS, settings)


def adopt(directory: Path, vocab_size: int) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a model as one of ours, and what the user should know.

    None if there is none, or one that we cannot use; the model itself can be converted then.

    Args:
      directory: of the model.
      vocab_size: V, the rows of its embedding.

    Raises:
      ValueError: for a tokenizer that does not belong to the model.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None, [f"has no {TOKENIZER}: text cannot be generated or measured"]
    tree = json_files.read(path)
    _check_size(path, tree, vocab_size)
    _rename(tree, _name(_settings(directory).get("eos_token")), END_OF_TEXT)
    _rename(tree, _name(_settings(directory).get("pad_token")), PAD)
    try:
        tokenizer = Tokenizer.adopt_json(json.dumps(tree), path)
    except ValueError as error:
        return None, [f"{error}; so text cannot be generated or measured"]
    if tokenizer.vocab_size > vocab_size:
        note = f"{path}: no id is free for {PAD}; so text cannot be generated or measured"
        return None, [note]
    return tokenizer, []


def _check_size(path: Path, tree: dict[str, Any], vocab_size: int) -> None:
    """Refuses a tokenizer with more ids than the model has rows."""
    try:
        vocab = tree["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in tree.get("added_tokens", [])]
        n = max(ids, default=-1) + 1
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizers file") from error
    if n > vocab_size:
        raise ValueError(
            f"{path}: has {n} tokens, and the model's vocab_size is {vocab_size}: it is the"
            " tokenizer of another model"
        )


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    return json_files.read(path) if path.is_file() else {}


def _name(token: Any) -> str | None:
    """The text of a special token, which may be written out as a section."""
    return token.get("content") if isinstance(token, dict) else token


def _rename(tree: dict[str, Any], old: str | None, new: str) -> None:
    """Gives a special token another name, in place, unless another one has it already."""
    vocab = tree["model"]["vocab"]
    added = {token["content"]: token for token in tree.get("added_tokens", [])}
    if old is None or old not in added or new in added or new in vocab:
        return
    added[old]["content"] = new
    added[old]["special"] = True
    if isinstance(vocab, dict) and old in vocab:
        vocab[new] = vocab.pop(old)
    tree["post_processor"] = None  # it would name the token; ours puts no tokens around a text

"""The corpus of a config's section `data`, prepared now if it is not yet."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data import packed, sources
from dsmoe_jax.data.corpus import MANIFEST, Corpus, load_corpus
from dsmoe_jax.data.fetch import sha256_of
from dsmoe_jax.data.hub_datasets import is_hub_dataset
from dsmoe_jax.data.local_copies import local_copy
from dsmoe_jax.data.own_text import located
from dsmoe_jax.data.prepare import fulfil
from dsmoe_jax.data.request import OPTIONS, Request, make_request
from dsmoe_jax.data.row_kinds import TEXT, get_kind
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.hardware.caches import cache_directory, make_writable
from dsmoe_jax.storage.places import is_address, place_of

BUILT_IN = tuple(sources.CORPORA)
# Keys of `data`.
_OPTIONS = (
    "validation",
    "tokenizer",
    "text_column",
    "keep_repeats",
    "dedup_across_domains",
    "rows",
)


def locate(corpus: str, key: str = "data.corpus") -> str:
    """A built-in corpus by its name, a dataset by its full name, any other by its absolute path.

    Args:
      corpus: its name or path.
      key: what the user calls it, for errors.

    Raises:
      ValueError: if it is neither a name, nor a path of a file system, nor in a bucket.
    """
    return corpus if corpus in BUILT_IN else located(corpus, key)


def is_there(corpus: str) -> bool:
    """Whether there is a corpus of this name or path."""
    if is_address(corpus):
        return place_of("data.corpus", corpus).exists()
    return corpus in BUILT_IN or is_hub_dataset(corpus) or Path(locate(corpus)).exists()


def is_unprepared_chat(config: DataConfig) -> bool:
    """Whether the corpus of a config is conversations that must be prepared first."""
    name = config.corpus
    if name is None or not is_there(name) or _is_prepared(locate(name)):
        return False
    rows = sources.CORPORA[name].rows if name in BUILT_IN else config.rows
    return get_kind(rows).answers_only


def open_corpus(config: DataConfig, *, to_measure: bool = False) -> Corpus:
    """The corpus of a config; one that is not prepared yet is prepared now, in the cache.

    Args:
      config: of the corpus.
      to_measure: hold all text of one's own out, also such as is not for training by its name.

    Raises:
      ValueError: naming the key, if there is no such corpus or it does not fit the config.
    """
    name = config.corpus
    if name is None:
        raise ValueError(
            f"data.corpus=None: must be one of {BUILT_IN}, a file or directory of text, or a corpus"
            " prepared from it"
        )
    if not is_there(name):
        raise ValueError(f"data.corpus={name!r}: no such file or directory, nor one of {BUILT_IN}")
    source = locate(name)
    if is_address(source):
        source = name = str(local_copy("data.corpus", source))
    if _is_prepared(source):
        corpus = _open_prepared(Path(source))
        _check_prepared(config, corpus)
        return corpus
    request = make_request(
        name,
        config.tokenizer_vocab_size,
        config.sequence_length,
        config.domains or None,
        **{key: getattr(config, key) for key in _OPTIONS},
        to_measure=to_measure,
    )
    directory = _prepared_directory(config, request)
    if not directory.exists():
        make_writable(directory.parent)
    return fulfil(request, directory)


def open_to_measure(path: str, tokenizer: Path, sequence_length: int, rows: str = TEXT) -> Corpus:
    """Text to measure a model on, in the tokens that it was trained on.

    Of text of one's own all is held out, copies too; a prepared corpus, which must be of the same
    tokenizer, and a built-in one keep their held-out part.

    Args:
      path: as `data.corpus`.
      tokenizer: file of the model's.
      sequence_length: of the model's training.
      rows: of text of one's own, see `row_kinds`.

    Raises:
      ValueError: if there is no text, or it has other tokens or another length of sequences.
    """
    prepared = _is_prepared(locate(path, "corpus"))
    data = DataConfig(
        path,
        sequence_length,
        Tokenizer.load(tokenizer).vocab_size,
        tokenizer=None if prepared else str(tokenizer),
        keep_repeats=not prepared and path not in BUILT_IN,
        rows=rows,
    )
    corpus = open_corpus(data, to_measure=path not in BUILT_IN)
    check_same_tokenizer(corpus, tokenizer_fingerprint(Tokenizer.load(tokenizer)), "the model")
    return corpus


def _is_prepared(source: str) -> bool:
    """Whether a located corpus is prepared already: a directory, or packed in one file."""
    path = local_copy("data.corpus", source) if is_address(source) else Path(source)
    return source not in BUILT_IN and ((path / MANIFEST).is_file() or packed.is_packed(path))


def _open_prepared(path: Path) -> Corpus:
    """The corpus of a directory, or of a packed file, which is unpacked in the cache."""
    if not packed.is_packed(path):
        return load_corpus(path)
    name = path.name.removesuffix(packed.SUFFIX)
    directory = cache_directory() / "corpora" / f"{name}-{sha256_of(path)[:12]}"
    if not directory.exists():
        make_writable(directory.parent)
    return packed.unpack(path, directory)


def _check_prepared(config: DataConfig, corpus: Corpus) -> None:
    """Refuses a prepared corpus whose sizes or domains are not those of the config."""
    if corpus.sequence_length != config.sequence_length:
        raise ValueError(
            f"data.sequence_length={config.sequence_length}: the corpus {corpus.directory} is"
            f" packed for {corpus.sequence_length}"
        )
    if corpus.vocab_size > config.tokenizer_vocab_size:
        raise ValueError(
            f"data.tokenizer_vocab_size={config.tokenizer_vocab_size}: the corpus"
            f" {corpus.directory} has {corpus.vocab_size} tokens"
        )
    for key in _OPTIONS:
        value = getattr(config, key)
        if value != getattr(DataConfig(), key):
            raise ValueError(
                f"data.{key}={value!r}: the corpus {corpus.directory} is prepared already; give"
                f" --{key} to prepare_data"
            )
    if config.domains and set(config.domains) != set(corpus.domains):
        raise ValueError(
            f"data.domains={config.domains}: the corpus {corpus.directory} has {corpus.domains};"
            " leave data.domains empty for a prepared corpus"
        )


def _prepared_directory(config: DataConfig, request: Request) -> Path:
    """Directory in the cache: a readable name, and a hash of all that decides the content."""
    source = request["corpus"]
    key = [
        request["recipe"],
        source,
        request.get("sha256", platform.python_version()),
        config.tokenizer_vocab_size,
        config.sequence_length,
        config.domains or (),
        *[[name, request[name]] for name in OPTIONS if name in request],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    return cache_directory() / "corpora" / f"{Path(source).stem}-{digest}"


def check_same_corpus(corpus: Corpus, fingerprint: str) -> None:
    """Refuses to go on with other data than a checkpoint was made with.

    Where the text lies may change.

    Raises:
      ValueError: if the text has changed.
    """
    if corpus.fingerprint != fingerprint:
        raise ValueError(
            f"data.corpus: {corpus.directory} has changed since the checkpoint was made, or is"
            f" another corpus (fingerprint {corpus.fingerprint[:12]}, then {fingerprint[:12]});"
            " bring the old text back or start in another workdir"
        )


def check_same_tokenizer(corpus: Corpus, fingerprint: str, key: str) -> None:
    """Refuses to go on with a model whose embeddings stand for the tokens of another tokenizer.

    Args:
      corpus: to be trained on.
      fingerprint: of the model's tokenizer, from `tokenizer_fingerprint`.
      key: names the model in the error.

    Raises:
      ValueError: if the tokenizers differ.
    """
    if tokenizer_fingerprint(corpus.tokenizer) != fingerprint:
        raise ValueError(
            f"{key}: its tokenizer is not that of the corpus {corpus.directory}, its embeddings"
            " would stand for other tokens; must be trained on text of the same tokenizer"
        )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hexadecimal sha256 of a tokenizer."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()

"""Requests: all that a corpus is made from, checked, and kept in its manifest.

The same request gives the same records, on every machine.
"""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe_jax.data import own_text, row_kinds, sources
from dsmoe_jax.data.row_kinds import RowKind
from dsmoe_jax.data.text_formats import TEXT_COLUMN
from dsmoe_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer

# Raised whenever the same request would give other records: a reader, the split, the packing.
RECIPE = 1
Request = dict[str, Any]
"""Keys `recipe`, `corpus`, `vocab_size`, `sequence_length`, `max_bytes_per_domain`, `domains`; what
pins the text (`sha256`, `packages`, `python`); and those of OPTIONS that are not at their default.
"""

OPTIONS = (
    "validation",
    "tokenizer",
    "tokenizer_sha256",
    "text_column",
    "keep_repeats",
    "to_measure",
    "rows",
    "dedup_across_domains",
    "in_parts",
)


def make_request(
    corpus: str,
    vocab_size: int | None,
    sequence_length: int,
    domains: Sequence[str] | None = None,
    max_bytes_per_domain: int | None = None,
    *,
    validation: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    text_column: str = TEXT_COLUMN,
    keep_repeats: bool = False,
    to_measure: bool = False,
    rows: str = row_kinds.TEXT,
    dedup_across_domains: bool = False,
    in_parts: bool = False,
) -> Request:
    """A request for the corpus that `prepare` makes; the arguments are explained there.

    Raises:
      ValueError: naming the argument that is wrong.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 1")
    if max_bytes_per_domain is not None and max_bytes_per_domain < 1:
        raise ValueError(f"max_bytes_per_domain={max_bytes_per_domain}: must be at least 1")
    request: Request = {
        "recipe": RECIPE,
        "corpus": corpus,
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
        "max_bytes_per_domain": max_bytes_per_domain or _default_max_bytes(corpus),
    }
    if keep_repeats and dedup_across_domains:
        raise ValueError("keep_repeats=True: cannot be together with dedup_across_domains=True")
    request |= _tokenizer(tokenizer, vocab_size)
    row_kinds.get_kind(rows)
    if corpus in sources.CORPORA:
        own = {"validation": validation, "text_column": text_column, "rows": rows}
        defaults = {"validation": None, "text_column": TEXT_COLUMN, "rows": row_kinds.TEXT}
        for key, default in defaults.items():
            if own[key] != default:
                raise ValueError(
                    f"{key}={own[key]}: is for text of one's own, not for the corpus {corpus!r}"
                )
        request |= _built_in(corpus, domains)
        rows = sources.CORPORA[corpus].rows
    else:
        held_out = corpus if to_measure else validation
        reading = None if in_parts else (text_column, row_kinds.get_kind(rows))
        request |= _own_text(corpus, domains, held_out, to_measure, reading)
        request |= {} if text_column == TEXT_COLUMN else {"text_column": text_column}
    request |= {"to_measure": True} if to_measure else {}
    request |= {"dedup_across_domains": True} if dedup_across_domains else {}
    request |= {"in_parts": True} if in_parts else {}
    request |= {} if rows == row_kinds.TEXT else {"rows": rows}
    return request | ({"keep_repeats": True} if keep_repeats else {})


def kind_of(request: Request) -> RowKind:
    """The kind of the rows of a request."""
    return row_kinds.get_kind(request.get("rows", row_kinds.TEXT))


def _tokenizer(path: str | os.PathLike | None, vocab_size: int | None) -> Request:
    """The size of a given tokenizer, and which one it is."""
    if path is None:
        if vocab_size is None or vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size={vocab_size}: byte-level BPE needs >= {MIN_VOCAB_SIZE}")
        return {}
    file = own_text.absolute(path, "tokenizer")
    tokenizer = Tokenizer.adopt(file)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {tokenizer.vocab_size}, the tokens of the"
            f" tokenizer {file}"
        )
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": str(file),
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
    }


def _default_max_bytes(corpus: str) -> int | None:
    """The cap of a built-in corpus; the user's own text has none."""
    return sources.CORPORA[corpus].max_bytes if corpus in sources.CORPORA else None


def _built_in(corpus: str, domains: Sequence[str] | None) -> Request:
    """The domains of a built-in corpus, and what pins their text."""
    built_in = sources.CORPORA[corpus]
    names = check_domains(domains, built_in.known) or list(built_in.domains)
    parts = [part for name in names for part in built_in.known[name]]
    packages = {part.package for part in parts if isinstance(part, sources.Source)}
    if not packages:
        return {"domains": names, "python": platform.python_version()}
    return {"domains": names, "packages": sorted(sources.PACKAGES[p].pin for p in packages)}


def _own_text(
    corpus: str,
    domains: Sequence[str] | None,
    validation: str | os.PathLike | None,
    to_measure: bool,
    reading: tuple[str, RowKind] | None,
) -> Request:
    """The place of the user's text, and its sha256; without `reading` only a list of its files."""
    path = own_text.readable(corpus, "corpus")
    held_out = None if validation is None else own_text.readable(validation, "validation")
    found = own_text.find(path, held_out, to_train=not to_measure)
    request: Request = {
        "corpus": path,
        "domains": list(domains) if domains else None,
    }
    if reading is None:
        request["files"] = own_text.listing(found)
    else:
        request["sha256"] = own_text.fingerprint(found, *reading)
    return request | ({} if held_out is None else {"validation": held_out})


def check_domains(domains: Sequence[str] | None, known: Mapping[str, object]) -> list[str]:
    """`domains` as a list without repeats; refuses unknown ones."""
    for domain in domains or ():
        if domain not in known:
            raise ValueError(f"unknown domain {domain!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(domains or ()))

"""Prepares a corpus: fetches or reads text, trains a tokenizer, packs sequences.

python -m dsmoe_jax prepare_data --corpus=demo --out=DIR --vocab_size=4096 --sequence_length=256
python -m dsmoe_jax prepare_data --corpus=my_texts/ --out=DIR --vocab_size=8192 \\
    --sequence_length=2048
python -m dsmoe_jax prepare_data --corpus=more_texts/ --validation=held_out.jsonl --out=OTHER \\
    --tokenizer=DIR --sequence_length=2048
python -m dsmoe_jax prepare_data --corpus=conversations.jsonl --rows=chat --out=CHAT \\
    --tokenizer=DIR --sequence_length=2048
python -m dsmoe_jax prepare_data --corpus=gpu --out=DIR --vocab_size=8192 --sequence_length=1024 \\
    --pack=gpu.tar.xz --max_packed_mb=40

python -m dsmoe_jax prepare_data --corpus=many_files/ --out=DIR --tokenizer=OTHER \\
    --sequence_length=2048 --shards=16 --shard=3

What a path may hold, and what of it is held out, is written down in docs/data.md.

A corpus of many files is prepared by many processes, on hosts that see one file system: each is
started with --shards and its own --shard, and started again goes on where it was killed.  The last
one to finish writes the index.  --shards alone does the work of all, --merge only writes the index.

Training prepares a missing corpus by itself; one that is prepared here can be shared and inspected.
`--config.data.corpus=DIR` trains on it.

A machine without a network takes it as one file: --pack writes it,
`--config.data.corpus=FILE.tar.xz` trains on it.  --max_packed_mb finds the largest cap of a domain
with which that file is no larger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data import in_parts, packed, sources
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.fitting import fit
from dsmoe_jax.data.opening import locate
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.data.row_kinds import ROW_KINDS, TEXT
from dsmoe_jax.data.selection import say
from dsmoe_jax.data.user_files import shown

_CORPUS = flags.DEFINE_string(
    "corpus",
    None,
    ", ".join(f"{name} ({corpus.download})" for name, corpus in sources.CORPORA.items())
    + ", or a path: .txt, .jsonl (text, optional"
    " domain), .parquet, each also as .gz or .zst, a directory of them, a saved Hugging Face"
    " dataset.  Of files and folders named train, validation (valid, val, dev) and test the first"
    " are trained on, the second held out, the last left out.  Or what Hugging Face's datasets"
    " reads: hf:NAME_OR_PATH[@CONFIG][:SPLIT].",
)
_OUT = flags.DEFINE_string("out", None, "Directory to make; never overwritten.")
_VALIDATION = flags.DEFINE_string(
    "validation", None, "Text to hold out, a path like --corpus; by default 5 % of every domain."
)
_TEXT_COLUMN = flags.DEFINE_string("text_column", "text", "The field of a row that has its text.")
_ROWS = flags.DEFINE_string(
    "rows",
    TEXT,
    f"What a row is: {' or '.join(ROW_KINDS)}.  Of conversations only the answers are learned.",
)
_KEEP_REPEATS = flags.DEFINE_bool(
    "keep_repeats", False, "Keep exact copies of a document: it weighs as much as it has copies."
)
_DEDUP_ACROSS_DOMAINS = flags.DEFINE_bool(
    "dedup_across_domains",
    False,
    "Leave out exact copies of documents of other domains, too: the first domain keeps its own.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "A byte-level tokenizer to use instead of training one: a JSON file of the tokenizers library,"
    " or a directory with a tokenizer.json (a prepared corpus, a Hugging Face model).",
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "Tokens, special ones included; not needed with --tokenizer."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", None, "Inputs of a sequence.")
_DOMAINS = flags.DEFINE_list(
    "domains",
    None,
    "The domains to take.  "
    + "  ".join(
        f"Of {name}: {', '.join(corpus.domains)}"
        + (f"; and only when named: {', '.join(corpus.extra)}." if corpus.extra else ".")
        for name, corpus in sources.CORPORA.items()
    ),
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes_per_domain",
    None,
    "Cap on the text of a domain; by default "
    + ", ".join(
        f"{corpus.max_bytes:,} ({name})"
        for name, corpus in sources.CORPORA.items()
        if corpus.max_bytes is not None
    )
    + ", and no cap on other text.",
)
_PACK = flags.DEFINE_string(
    "pack", None, "Also write the corpus into this file, NAME.tar.xz; never overwritten."
)
_MAX_PACKED_MB = flags.DEFINE_float(
    "max_packed_mb",
    None,
    "The most MB (10^6 bytes) that the packed file may have: the cap on the text of a domain is"
    " then the largest with which it fits, and is printed.  Prepares the corpus several times.",
    lower_bound=0.0,
)


_SHARDS = flags.DEFINE_integer(
    "shards", None, "Prepare the corpus in parts, by so many processes.", lower_bound=1
)
_SHARD = flags.DEFINE_integer(
    "shard", None, "Which of the processes this one is, from 0; by default all.", lower_bound=0
)
_MERGE = flags.DEFINE_bool(
    "merge", False, "Only write the index of parts that are done; says which shards are missing."
)


def main() -> None:
    """Runs the command."""
    if _MERGE.value:
        _print_table(in_parts.merge(_given(_OUT, "DIR"), _SHARDS.value or 1))
        return
    corpus = locate(_given(_CORPUS, "demo"), "--corpus")
    out = local_path("--out", _given(_OUT, "DIR"))
    pack = None if _PACK.value is None else local_path("--pack", _PACK.value)
    if pack is not None:
        packed.check_new(pack)
    sizes = {
        "vocab_size": _VOCAB_SIZE.value if _TOKENIZER.value else _given(_VOCAB_SIZE, 4096),
        "sequence_length": _given(_SEQUENCE_LENGTH, 256),
        "domains": _DOMAINS.value or None,
        "validation": _VALIDATION.value,
        "tokenizer": _TOKENIZER.value,
        "text_column": _TEXT_COLUMN.value,
        "keep_repeats": _KEEP_REPEATS.value,
        "rows": _ROWS.value,
        "dedup_across_domains": _DEDUP_ACROSS_DOMAINS.value,
    }
    if _SHARDS.value is not None:
        _prepare_in_parts(corpus, out, sizes)
        return
    if _SHARD.value is not None:
        raise ValueError(f"--shard={_SHARD.value}: needs --shards, the number of processes")
    prepared = prepare(corpus, out, max_bytes_per_domain=_max_bytes(corpus, sizes), **sizes)
    _print_table(prepared)
    if pack is not None:
        say(f"packing {pack}")
        print(f"{packed.pack(prepared, pack) / 1e6:.2f} MB in {pack}")


def _prepare_in_parts(corpus: str, out: Path, sizes: dict[str, Any]) -> None:
    if corpus in sources.CORPORA:
        raise ValueError(f"--shards: is for text of one's own, not for the corpus {corpus!r}")
    for flag in (_MAX_BYTES, _PACK, _MAX_PACKED_MB):
        if flag.value is not None:
            raise ValueError(f"--{flag.name}={flag.value}: cannot be together with --shards")
    prepared = in_parts.prepare(corpus, out, shards=_SHARDS.value or 1, shard=_SHARD.value, **sizes)
    if prepared is not None:
        _print_table(prepared)


def _max_bytes(corpus: str, sizes: dict[str, Any]) -> int | None:
    """The cap of a domain: the one given, or the largest with which the corpus fits."""
    if _MAX_PACKED_MB.value is None:
        return _MAX_BYTES.value
    if _MAX_BYTES.value is not None:
        raise ValueError(
            f"--max_bytes_per_domain={_MAX_BYTES.value}: is what --max_packed_mb finds; leave out"
            " one of them"
        )
    return fit(corpus, int(_MAX_PACKED_MB.value * 1e6), **sizes)


def _given(flag: flags.FlagHolder, example: object) -> Any:
    if flag.value is None:
        raise ValueError(f"--{flag.name}: missing; for example --{flag.name}={example}")
    return flag.value


def _print_table(corpus: Corpus) -> None:
    """Prints the sizes of the corpus, one line a domain."""
    print(f"{'domain':<16}{'documents':>11}{'train MB':>10}{'train tokens':>14}{'held out':>11}")
    for domain in corpus.manifest["domains"]:
        print(
            f"{shown(domain['name']):<16}{sum(domain['documents'].values()):>11}"
            f"{domain['bytes']['train'] / 1e6:>10.2f}{domain['tokens']['train']:>14}"
            f"{domain['tokens']['validation']:>11}"
        )
    train, validation = (corpus.num_records(split) for split in ("train", "validation"))
    print(f"{train} training and {validation} validation sequences in {corpus.directory}")

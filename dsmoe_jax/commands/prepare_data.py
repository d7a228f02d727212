"""Prepares a corpus: fetches or reads text, trains a tokenizer, packs sequences.

python -m dsmoe_jax prepare_data --corpus=demo --out=DIR --vocab_size=4096 --sequence_length=256
python -m dsmoe_jax prepare_data --corpus=my_texts/ --out=DIR --vocab_size=8192 \\
    --sequence_length=2048
python -m dsmoe_jax prepare_data --corpus=more_texts/ --validation=held_out.jsonl --out=OTHER \\
    --tokenizer=DIR --sequence_length=2048

What a path may hold, and what of it is held out, is written down in docs/data.md.

Training prepares a missing corpus by itself; one that is prepared here can be shared and inspected.
`--config.data.corpus=DIR` trains on it.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from dsmoe_jax.config.paths import local_path
from dsmoe_jax.data import sources
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import locate
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.data.request import DEFAULT_MAX_BYTES
from dsmoe_jax.data.user_files import shown

_CORPUS = flags.DEFINE_string(
    "corpus",
    None,
    "demo (downloads 70 MB), stdlib (no download), or a path: .txt, .jsonl (text, optional"
    " domain), .parquet, each also as .gz or .zst, a directory of them, a saved Hugging Face"
    " dataset.  Of files and folders named train, validation (valid, val, dev) and test the first"
    " are trained on, the second held out, the last left out.",
)
_OUT = flags.DEFINE_string("out", None, "Directory to make; never overwritten.")
_VALIDATION = flags.DEFINE_string(
    "validation", None, "Text to hold out, a path like --corpus; by default 5 % of every domain."
)
_TEXT_COLUMN = flags.DEFINE_string("text_column", "text", "The field of a row that has its text.")
_KEEP_REPEATS = flags.DEFINE_bool(
    "keep_repeats", False, "Keep exact copies of a document: it weighs as much as it has copies."
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
    f"The domains to take.  Of demo: {', '.join(sources.DEMO)}; and only when named:"
    f" {', '.join(sources.EXTRA)}.  Of stdlib: {', '.join(sources.STDLIB)}.",
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes_per_domain",
    None,
    "Cap on the text of a domain; by default "
    + ", ".join(f"{size:,} ({name})" for name, size in DEFAULT_MAX_BYTES.items())
    + ", and no cap on your own text.",
)


def main() -> None:
    """Runs the command."""
    corpus = prepare(
        locate(_given(_CORPUS, "demo"), "--corpus"),
        local_path("--out", _given(_OUT, "DIR")),
        _VOCAB_SIZE.value if _TOKENIZER.value else _given(_VOCAB_SIZE, 4096),
        _given(_SEQUENCE_LENGTH, 256),
        _DOMAINS.value or None,
        _MAX_BYTES.value,
        validation=_VALIDATION.value,
        tokenizer=_TOKENIZER.value,
        text_column=_TEXT_COLUMN.value,
        keep_repeats=_KEEP_REPEATS.value,
    )
    _print_table(corpus)


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

"""Prepare a corpus: fetch or read text, train a tokenizer, pack sequences.

    python -m dsmoe_jax.prepare_data --corpus=demo --out=DIR --vocab_size=4096 \\
        --sequence_length=256
"""

import argparse
import sys

from dsmoe_jax.data import sources
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.prepare import DEFAULT_MAX_BYTES, prepare


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsmoe_jax.prepare_data",
        description="Prepare a corpus: labelled text -> byte-level BPE -> packed sequences.",
        epilog=f"demo domains: {', '.join(sources.DEMO)}; only when named: "
        f"{', '.join(sources.EXTRA)}. stdlib domains: {', '.join(sources.STDLIB)}.",
    )
    parser.add_argument(
        "--corpus",
        required=True,
        help="demo (downloads 70 MB), stdlib (no download), or a path: .txt, .jsonl (text, "
        "optional domain), .parquet, a directory of them, a saved Hugging Face dataset",
    )
    parser.add_argument("--out", required=True, help="directory to make; never overwritten")
    parser.add_argument("--vocab_size", type=int, required=True, help="tokens, special included")
    parser.add_argument("--sequence_length", type=int, required=True, help="inputs per sequence")
    parser.add_argument("--domains", help="comma-separated names of the domains to take")
    parser.add_argument(
        "--max_bytes_per_domain",
        type=int,
        help=f"cap on the text of a domain (default {DEFAULT_MAX_BYTES}, own text: none)",
    )
    return parser.parse_args()


def _print_table(corpus: Corpus) -> None:
    """What the corpus holds, a line per domain."""
    print(f"{'domain':<16}{'documents':>11}{'train MB':>10}{'train tokens':>14}{'held out':>11}")
    for domain in corpus.manifest["domains"]:
        print(
            f"{domain['name']:<16}{sum(domain['documents'].values()):>11}"
            f"{domain['bytes']['train'] / 1e6:>10.2f}{domain['tokens']['train']:>14}"
            f"{domain['tokens']['validation']:>11}"
        )
    train, validation = (corpus.num_records(split) for split in ("train", "validation"))
    print(f"{train} training and {validation} validation sequences in {corpus.directory}")


def main() -> int:
    """Parse the flags, prepare, print what came out."""
    args = _parse()
    try:
        corpus = prepare(
            args.corpus,
            args.out,
            args.vocab_size,
            args.sequence_length,
            domains=args.domains.split(",") if args.domains else None,
            max_bytes_per_domain=args.max_bytes_per_domain,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_table(corpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The manifest of a corpus that was prepared in parts, added up from its parts."""

from __future__ import annotations

import hashlib
from typing import Any

from dsmoe_jax.data import prepare as whole
from dsmoe_jax.data.corpus import FORMAT, SPLITS, TOKENIZER
from dsmoe_jax.data.parts import Parts
from dsmoe_jax.data.selection import left_out_note, say
from dsmoe_jax.data.tokenizer import Tokenizer

_LEFT_OUT = ("repeats", "in_other_domains", "held_out_too")


def manifest(parts: Parts, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the corpus, from what is in its parts.

    Args:
      parts: of the corpus.
      entries: of each part what `part_records.pack` has noted.

    Raises:
      ValueError: if no sequence was long enough for a conversation.
    """
    tokenizer_json = (parts.out / TOKENIZER).read_text("utf-8")
    fingerprint = hashlib.sha256(tokenizer_json.encode("utf-8"))
    fingerprint.update(str(parts.request["sequence_length"]).encode())
    splits = {}
    for side in SPLITS:
        files = [part["files"][side] for part in entries if side in part["files"]]
        for file in files:
            fingerprint.update(f"{side} {file['records']} {file['sha256']}\n".encode())
        if not files:
            length = parts.request["sequence_length"]
            raise ValueError(
                f"sequence_length={length}: no conversation of {side} has an answer within so"
                " many tokens; must be more"
            )
        splits[side] = {
            "records": sum(sum(file["records"]) for file in files),
            "shards": [file["name"] for file in files],
            "records_by_domain": [file["records"] for file in files],
            "file_bytes": [file["bytes"] for file in files],
        }
    origin = {"source": parts.request["corpus"], "licence": "yours"}
    domains = [
        {**_added([part["domains"][g] for part in entries]), "origin": [origin]}
        for g in range(len(entries[0]["domains"]))
    ]
    notes = [
        *parts.found.notes(),
        *left_out_note(
            sum(sum(domain["documents"].values()) for domain in domains),
            blank=sum(part["blank"] for part in entries),
            **{key: sum(domain[key] for domain in domains) for key in _LEFT_OUT},
        ),
        *whole.too_long_note(domains, parts.request),
    ]
    for note in notes:
        say(note)
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "vocab_size": Tokenizer.load(parts.out / TOKENIZER).vocab_size,
        "sequence_length": parts.request["sequence_length"],
        "request": parts.request,
        "notes": notes,
        **({"answers_only": True} if parts.kind.answers_only else {}),
        "domains": domains,
        "splits": splits,
    }


def _added(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a domain, from those of the parts: numbers are added, and hashes hashed."""
    total: dict[str, Any] = {}
    hashes = hashlib.sha256()
    for entry in entries:
        hashes.update(entry["sha256"].encode())
        for key, value in entry.items():
            if isinstance(value, dict):
                before = total.setdefault(key, {})
                total[key] = {side: before.get(side, 0) + n for side, n in value.items()}
            elif isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return {"name": entries[0]["name"], "sha256": hashes.hexdigest(), **total}

"""The records of one part of a corpus: its text, tokenised and packed.

Shapes: N documents of the part.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np

from dsmoe_jax.data import packing, survey
from dsmoe_jax.data import prepare as whole
from dsmoe_jax.data.corpus import SPLITS
from dsmoe_jax.data.directories import whole_file
from dsmoe_jax.data.documents import Split
from dsmoe_jax.data.parts import Parts
from dsmoe_jax.data.survey import HELD_OUT_TOO, IN_OTHER_DOMAIN, REPEAT, Survey
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.progress import Silent


def pack(parts: Parts, part: int, tokenizer: Tokenizer) -> None:
    """Writes the records of a part, and last what is in them.

    Args:
      parts: of the corpus; all surveys and copies must be there.
      part: its number.
      tokenizer: of the corpus.

    Raises:
      ValueError: if the input file has changed since its survey.
    """
    found = parts.load_survey(part)
    rows = list(parts.rows(part))
    again = survey.survey(rows)
    if not np.array_equal(again.hash_N2, found.hash_N2) or again.names != found.names:
        raise ValueError(
            f"{parts.files[part].path}: has changed while the corpus was prepared; remove"
            f" {parts.out} and do it again"
        )
    splits = _splits(parts, part, found, [document.text for _, document in rows])
    entries = {
        name: whole.domain_entry(name, split, [], parts.kind)
        | {"held_out_too": split.held_out_too, "in_other_domains": split.in_other_domains}
        for name, split in splits.items()
    }
    files: dict[str, Any] = {}
    for side in SPLITS:
        encode = functools.partial(whole.encode, tokenizer=tokenizer, request=parts.request)
        by_domain = [
            encode(getattr(split, side), domain=g, entry=entries[name], part=side, line=Silent())
            for g, (name, split) in enumerate(splits.items())
        ]
        if any(by_domain):
            files[side] = _write_records(parts, part, side, by_domain)
    about = {"files": files, "domains": list(entries.values())}
    about["blank"] = int((found.domain_N == survey.BLANK).sum())
    parts.write(parts.path("part", part, "json").name, json.dumps(about))


def _splits(parts: Parts, part: int, found: Survey, texts: list[str]) -> dict[str, Split]:
    """The texts of a part by domain, in the order of their hashes: a random one."""
    held_out_N = parts.held_out(part, found)
    copies = parts.copies(part)
    why_N = np.array([copies.get(i, 0) for i in range(len(texts))], np.int8)
    names = [*found.names, None]
    order = np.lexsort((found.hash_N2[:, 1], found.hash_N2[:, 0])).tolist()
    splits = {}
    for name in parts.domains:
        mine = [i for i in order if names[found.domain_N[i]] == name]
        stays = [i for i in mine if why_N[i] == 0]
        counts = [int(np.sum(why_N[mine] == why)) for why in (REPEAT, HELD_OUT_TOO)]
        splits[name] = Split(
            [texts[i] for i in stays if not held_out_N[i]],
            [texts[i] for i in stays if held_out_N[i]],
            repeats=counts[0],
            held_out_too=counts[1],
            in_other_domains=int(np.sum(why_N[mine] == IN_OTHER_DOMAIN)),
        )
    return splits


def _write_records(
    parts: Parts, part: int, side: str, by_domain: list[list[bytes]]
) -> dict[str, Any]:
    name = f"{side}-{part:05}-of-{len(parts.files):05}.array_record"
    records = [record for records in by_domain for record in records]
    with whole_file(parts.out / name) as temporary:
        packing.write_shard(temporary, records)
        size = temporary.stat().st_size
    total = hashlib.sha256()
    for record in records:
        total.update(record)
    by_domain_counts = [len(records) for records in by_domain]
    return {"name": name, "records": by_domain_counts, "bytes": size,
            "sha256": total.hexdigest()}  # fmt: skip

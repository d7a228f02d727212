"""Prepares a corpus in parts: by many processes on many hosts, each a share of the input files.

A part is an input file (of a dataset of Hugging Face: one of its files).  The corpus depends on the
files, not on how many processes prepare it or how often one is killed:

    OUT/parts/plan.json                the request, which all processes must have
    OUT/parts/survey-00000.npz         of each part: its documents, see survey.py
    OUT/parts/sample-00000.json        of each part: text to train the tokenizer on
    OUT/parts/copies-00000.npz         of each bucket of hashes: documents that are left out
    OUT/tokenizer.json                 the same, whichever process trains it
    OUT/train-00000-of-0000N.array_record    of each part: its records, domain by domain
    OUT/parts/part-00000.json          of each part, when its files are whole: what is in them
    OUT/manifest.json                  the index; then OUT/parts is removed

A process makes what its own parts need; surveys that no other process has made yet it makes itself,
so that none waits for another.  Whichever finds all parts done writes the manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import own_text, packing, survey
from dsmoe_jax.data import prepare as whole
from dsmoe_jax.data.corpus import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Corpus,
    load_corpus,
    read_manifest,
)
from dsmoe_jax.data.directories import whole_file
from dsmoe_jax.data.documents import Document, Split
from dsmoe_jax.data.hub_datasets import HubPart
from dsmoe_jax.data.own_text import absolute
from dsmoe_jax.data.request import Request, check_domains, kind_of, make_request
from dsmoe_jax.data.selection import left_out_note, say
from dsmoe_jax.data.split_names import VALIDATION
from dsmoe_jax.data.survey import HELD_OUT_TOO, IN_OTHER_DOMAIN, REPEAT, Copies, Survey
from dsmoe_jax.data.text_formats import TEXT_COLUMN
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.data.user_files import TextFile
from dsmoe_jax.progress import Silent

PARTS = "parts"
PLAN = "plan.json"
SAMPLE_BYTES = 256_000_000  # of text that a tokenizer is trained on, from all parts alike
_MOST_BUCKETS = 256
_LEFT_OUT = ("repeats", "in_other_domains", "held_out_too")
_NO_PLAN = "exists and is not a corpus; choose another directory"


def prepare(
    corpus: str,
    out: str | Path,
    vocab_size: int | None,
    sequence_length: int,
    domains: Sequence[str] | None = None,
    *,
    shards: int = 1,
    shard: int | None = None,
    **options: Any,
) -> Corpus | None:
    """Prepares a share of the parts of `corpus`, and the manifest if all are done.

    What was done before, by this process or another, is not done again.

    Args:
      corpus: text of one's own.
      out: directory that all processes see.
      vocab_size, sequence_length, domains: see `make_request`.
      shards: number of processes.
      shard: which of them this one is, from 0; None does the work of all.
      **options: further keywords of `make_request`.

    Returns:
      The corpus, or None if parts of other processes are not done yet.

    Raises:
      ValueError: for any bad input, in one line.
    """
    if shards < 1:
        raise ValueError(f"shards={shards}: must be at least 1")
    if shard is not None and not 0 <= shard < shards:
        raise ValueError(f"shard={shard}: must be from 0 to shards - 1 = {shards - 1}")
    request = make_request(corpus, vocab_size, sequence_length, domains, in_parts=True, **options)
    job = Job(request, absolute(out, "out"))
    if job.is_done():
        return load_corpus(job.out)
    try:
        job.begin()
        job.make(shards, shard)
        done = job.merge(shards)
    except FileNotFoundError:
        if not job.is_done():  # another process has written the manifest and removed the parts
            raise
        done = True
    return load_corpus(job.out) if done else None


def merge(out: str | Path, shards: int = 1) -> Corpus:
    """Writes the manifest of a corpus whose parts are all done.

    Args:
      out: its directory.
      shards: number of processes, to name those that are missing.

    Raises:
      ValueError: naming the shards that are not done.
    """
    directory = absolute(out, "out")
    if (directory / MANIFEST).is_file():
        return load_corpus(directory)
    plan = directory / PARTS / PLAN
    if not plan.is_file():
        raise ValueError(f"out={directory}: holds no parts; prepare_data --shards=N makes them")
    job = Job(json.loads(plan.read_text("utf-8")), directory)
    if not job.merge(shards):
        missing = sorted({part % shards for part in job.missing()})
        names = ", ".join(f"--shard={shard}" for shard in missing)
        raise ValueError(
            f"out={directory}: {len(job.missing())} of {len(job.parts)} parts are not done; of"
            f" --shards={shards} start {names}"
        )
    return load_corpus(directory)


class Job:
    """A corpus that is being prepared in parts.

    Args:
      request: for it.
      out: its directory.

    Attributes:
      parts: the input files, in order.
    """

    def __init__(self, request: Request, out: Path):
        self.request = request
        self.out = out
        self._directory = out / PARTS
        self._kind = kind_of(request)
        self._found = own_text.find(request["corpus"], request.get("validation"))
        if own_text.listing(self._found) != request["files"]:
            raise ValueError(f"corpus {request['corpus']}: other files than when it was begun")
        self.parts = [part for file in self._found.files for part in _divided(file)]
        self._says_split = any(part.split == VALIDATION for part in self.parts)
        self._n_buckets = min(len(self.parts), _MOST_BUCKETS)

    def is_done(self) -> bool:
        """Whether the corpus is there; refuses a directory that holds anything else."""
        if not self.out.exists() or not any(self.out.iterdir()):
            return False
        if (self.out / MANIFEST).is_file():
            whole.refuse_other_request(self.out, read_manifest(self.out)["request"], self.request)
            shutil.rmtree(self._directory, ignore_errors=True)  # left by a process that was killed
            return True
        plan = self._directory / PLAN
        if not plan.is_file():
            raise ValueError(f"out={self.out}: {_NO_PLAN}")
        begun = json.loads(plan.read_text("utf-8"))
        whole.refuse_other_request(self.out, begun, self.request)
        return False

    def begin(self) -> None:
        """Writes the plan, unless another process has done so."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self._directory}: cannot be made: {error.strerror}") from error
        if not (self._directory / PLAN).exists():
            self._write(PLAN, json.dumps(self.request))

    def make(self, shards: int, shard: int | None) -> None:
        """Makes all that one process has to make; None: all processes."""
        own = [i for i in range(len(self.parts)) if shard is None or i % shards == shard]
        others = [i for i in range(len(self.parts)) if i not in set(own)]
        others = others[own[0] if own else 0 :] + others[: own[0] if own else 0]
        for part in [*own, *others]:
            if not self._path("survey", part, "npz").exists():
                say(f"reading {self.parts[part].path}")
                self._survey(part)
        self._find_copies([b for b in range(self._n_buckets) if b % shards == (shard or 0)])
        self._find_copies(list(range(self._n_buckets)))
        self._check_sides()
        tokenizer = self._tokenizer()
        for part in own:
            if not self._path("part", part, "json").exists():
                say(f"tokenising {self.parts[part].path}")
                self._pack(part, tokenizer)

    def missing(self) -> list[int]:
        """The parts that are not done."""
        return [i for i in range(len(self.parts)) if not self._path("part", i, "json").exists()]

    def merge(self, shards: int) -> bool:
        """Writes the manifest if all parts are done; whether they are."""
        if missing := self.missing():
            done = len(self.parts) - len(missing)
            others = ", ".join(map(str, sorted({part % shards for part in missing})))
            say(f"{done} of {len(self.parts)} parts are done; the shards {others} are not")
            return False
        entries = [json.loads(self._path("part", i, "json").read_text("utf-8")) for i in
                   range(len(self.parts))]  # fmt: skip
        manifest = self._manifest(entries)
        with whole_file(self.out / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        shutil.rmtree(self._directory, ignore_errors=True)
        return True

    @functools.cached_property
    def domains(self) -> list[str]:
        """The domains of the corpus, in order; all parts must have been surveyed."""
        known: dict[str, None] = {}
        for i in range(len(self.parts)):
            known |= dict.fromkeys(self._load_survey(i).names)
        return check_domains(self.request["domains"], known) or sorted(known)

    def _path(self, kind: str, number: int, suffix: str) -> Path:
        return self._directory / f"{kind}-{number:05}.{suffix}"

    def _write(self, name: str, text: str) -> None:
        with whole_file(self._directory / name) as temporary:
            temporary.write_text(text, "utf-8")

    def _load_survey(self, part: int) -> Survey:
        return Survey.load(self._path("survey", part, "npz"))

    def _rows(self, part: int) -> Iterator[tuple[str, Document]]:
        """(domain, document) of a part, in order."""
        file = self.parts[part]
        column = self.request.get("text_column", TEXT_COLUMN)
        for domain, document in self._kind.read(file.path, column):
            yield domain or file.domain, document

    def _survey(self, part: int) -> None:
        rows = list(self._rows(part))
        found = survey.survey(rows)
        if "tokenizer" not in self.request:
            texts = self._sample(part, found, [document.text for _, document in rows])
            self._write(self._path("sample", part, "json").name, json.dumps(texts))
        found.save(self._path("survey", part, "npz"))

    def _sample(self, part: int, found: Survey, texts: list[str]) -> list[str]:
        """Texts to train the tokenizer on, in the order of their hashes: a random choice."""
        if self.parts[part].split == VALIDATION:
            return []
        in_order = np.lexsort((found.hash_N2[:, 1], found.hash_N2[:, 0]))
        held_out_N = survey.is_held_out(found.hash_N2) & (not self._says_split)
        wanted = self.request["domains"]
        names = [*found.names, None]
        left = SAMPLE_BYTES // len(self.parts) + 1
        chosen: dict[str, None] = {}
        for i in in_order.tolist():
            name = names[found.domain_N[i]]
            is_read = name is not None and (not wanted or name in wanted) and not held_out_N[i]
            if left > 0 and is_read and texts[i] not in chosen:
                chosen[texts[i]] = None
                left -= len(texts[i].encode("utf-8"))
        return list(chosen)

    def _find_copies(self, buckets: list[int]) -> None:
        missing = [b for b in buckets if not self._path("copies", b, "npz").exists()]
        if not missing:
            return
        found = survey.find_copies(
            (self._load_survey(i) for i in range(len(self.parts))),
            [part.split == VALIDATION for part in self.parts],
            self.domains,
            missing,
            self._n_buckets,
            keep_repeats=self.request.get("keep_repeats", False),
            across_domains=self.request.get("dedup_across_domains", False),
        )
        for bucket, copies in found.items():
            copies.save(self._path("copies", bucket, "npz"))

    def _check_sides(self) -> None:
        """Refuses a corpus with nothing to train on or to hold out, before it is tokenised."""
        n_documents = dict.fromkeys(SPLITS, 0)
        for part in range(len(self.parts)):
            held_out_N = self._held_out(part, self._load_survey(part))
            for i, on_side in enumerate((~held_out_N, held_out_N)):
                n_documents[SPLITS[i]] += int(np.sum(on_side & self._stays(part)))
        for split, purpose in zip(SPLITS, ("train on", "hold out"), strict=True):
            if not n_documents[split]:
                raise ValueError(
                    f"corpus {self.request['corpus']}: holds no text to {purpose}; 5 % of the"
                    " documents are held out by their hashes, or those of validation=PATH"
                )

    def _held_out(self, part: int, found: Survey) -> np.ndarray:
        """Whether each document of a part is held out, bool (N,)."""
        if self._says_split:
            return np.full(len(found.domain_N), self.parts[part].split == VALIDATION)
        return survey.is_held_out(found.hash_N2)

    def _copies(self, part: int) -> dict[int, int]:
        """Why documents of a part are left out, by their place in it."""
        found: dict[int, int] = {}
        for bucket in range(self._n_buckets):
            found |= Copies.load(self._path("copies", bucket, "npz")).of_part(part)
        return found

    def _stays(self, part: int) -> np.ndarray:
        """Whether each document of a part is read, bool (N,)."""
        found = self._load_survey(part)
        names = [*found.names, None]
        stays_N = np.array([names[domain] in self.domains for domain in found.domain_N], bool)
        stays_N[list(self._copies(part))] = False
        return stays_N

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer that was given, or one trained on the samples of all parts."""
        path = self.out / TOKENIZER
        if not path.exists():
            texts = [
                text
                for i in range(len(self.parts) if "tokenizer" not in self.request else 0)
                for text in json.loads(self._path("sample", i, "json").read_text("utf-8"))
            ]
            made = whole.tokenizer_of(self.request, texts)
            with whole_file(path) as temporary:
                temporary.write_text(made.to_json(), "utf-8")
        return Tokenizer.load(path)

    def _pack(self, part: int, tokenizer: Tokenizer) -> None:
        """Writes the records of a part, and last what is in them."""
        found = self._load_survey(part)
        rows = list(self._rows(part))
        again = survey.survey(rows)
        if not np.array_equal(again.hash_N2, found.hash_N2) or again.names != found.names:
            raise ValueError(
                f"{self.parts[part].path}: has changed while the corpus was prepared; remove"
                f" {self.out} and do it again"
            )
        splits = self._splits(part, found, [document.text for _, document in rows])
        entries = {
            name: whole.domain_entry(name, split, [], self._kind)
            | {"held_out_too": split.held_out_too, "in_other_domains": split.in_other_domains}
            for name, split in splits.items()
        }
        files: dict[str, Any] = {}
        for side in SPLITS:
            encode = functools.partial(whole.encode, tokenizer=tokenizer, request=self.request)
            by_domain = [
                encode(
                    getattr(split, side), domain=g, entry=entries[name], part=side, line=Silent()
                )
                for g, (name, split) in enumerate(splits.items())
            ]
            if any(by_domain):
                files[side] = self._write_records(part, side, by_domain)
        about = {"files": files, "domains": list(entries.values())}
        about["blank"] = int((found.domain_N == survey.BLANK).sum())
        self._write(self._path("part", part, "json").name, json.dumps(about))

    def _splits(self, part: int, found: Survey, texts: list[str]) -> dict[str, Split]:
        """The texts of a part by domain, in the order of their hashes: a random one."""
        held_out_N = self._held_out(part, found)
        copies = self._copies(part)
        why_N = np.array([copies.get(i, 0) for i in range(len(texts))], np.int8)
        names = [*found.names, None]
        order = np.lexsort((found.hash_N2[:, 1], found.hash_N2[:, 0])).tolist()
        splits = {}
        for name in self.domains:
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

    def _write_records(self, part: int, side: str, by_domain: list[list[bytes]]) -> dict[str, Any]:
        name = f"{side}-{part:05}-of-{len(self.parts):05}.array_record"
        records = [record for records in by_domain for record in records]
        with whole_file(self.out / name) as temporary:
            packing.write_shard(temporary, records)
            size = temporary.stat().st_size
        total = hashlib.sha256()
        for record in records:
            total.update(record)
        by_domain_counts = [len(records) for records in by_domain]
        return {"name": name, "records": by_domain_counts, "bytes": size,
                "sha256": total.hexdigest()}  # fmt: skip

    def _manifest(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The manifest of the corpus, from what is in its parts."""
        tokenizer_json = (self.out / TOKENIZER).read_text("utf-8")
        fingerprint = hashlib.sha256(tokenizer_json.encode("utf-8"))
        fingerprint.update(str(self.request["sequence_length"]).encode())
        splits = {}
        for side in SPLITS:
            files = [part["files"][side] for part in parts if side in part["files"]]
            for file in files:
                fingerprint.update(f"{side} {file['records']} {file['sha256']}\n".encode())
            if not files:
                length = self.request["sequence_length"]
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
        origin = {"source": self.request["corpus"], "licence": "yours"}
        domains = [
            {**_added([part["domains"][g] for part in parts]), "origin": [origin]}
            for g in range(len(parts[0]["domains"]))
        ]
        notes = [
            *self._found.notes(),
            *left_out_note(
                sum(sum(domain["documents"].values()) for domain in domains),
                blank=sum(part["blank"] for part in parts),
                **{key: sum(domain[key] for domain in domains) for key in _LEFT_OUT},
            ),
            *whole.too_long_note(domains, self.request),
        ]
        for note in notes:
            say(note)
        return {
            "format": FORMAT,
            "fingerprint": fingerprint.hexdigest(),
            "vocab_size": Tokenizer.load(self.out / TOKENIZER).vocab_size,
            "sequence_length": self.request["sequence_length"],
            "request": self.request,
            "notes": notes,
            **({"answers_only": True} if self._kind.answers_only else {}),
            "domains": domains,
            "splits": splits,
        }


def _divided(file: TextFile) -> list[TextFile]:
    """A file as the parts that one process prepares: itself, or the files of a dataset."""
    if not isinstance(file.path, HubPart):
        return [file]
    return [dataclasses.replace(file, path=part) for part in file.path.divided()]


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

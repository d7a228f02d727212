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

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import prepare as whole
from dsmoe_jax.data import survey
from dsmoe_jax.data.corpus import MANIFEST, SPLITS, TOKENIZER, Corpus, load_corpus, read_manifest
from dsmoe_jax.data.directories import whole_file
from dsmoe_jax.data.own_text import absolute
from dsmoe_jax.data.part_records import pack
from dsmoe_jax.data.parts import PARTS, Parts
from dsmoe_jax.data.parts_manifest import manifest
from dsmoe_jax.data.request import Request, make_request
from dsmoe_jax.data.selection import say
from dsmoe_jax.data.split_names import VALIDATION
from dsmoe_jax.data.survey import Survey
from dsmoe_jax.data.tokenizer import Tokenizer

PLAN = "plan.json"
SAMPLE_BYTES = 256_000_000  # of text that a tokenizer is trained on, from all parts alike
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
        return load_corpus(job.parts.out)
    try:
        job.begin()
        job.make(shards, shard)
        done = job.merge(shards)
    except FileNotFoundError:
        if not job.is_done():  # another process has written the manifest and removed the parts
            raise
        done = True
    return load_corpus(job.parts.out) if done else None


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
        missing = sorted({part % shards for part in job.parts.missing()})
        names = ", ".join(f"--shard={shard}" for shard in missing)
        raise ValueError(
            f"out={directory}: {len(job.parts.missing())} of {len(job.parts.files)} parts are not"
            f" done; of --shards={shards} start {names}"
        )
    return load_corpus(directory)


class Job:
    """A corpus that is being prepared in parts: what is made, in which order.

    Args:
      request: for it.
      out: its directory.

    Attributes:
      parts: the input files, and what is known of them.
    """

    def __init__(self, request: Request, out: Path):
        self.parts = Parts(request, out)

    def is_done(self) -> bool:
        """Whether the corpus is there; refuses a directory that holds anything else."""
        if not self.parts.out.exists() or not any(self.parts.out.iterdir()):
            return False
        if (self.parts.out / MANIFEST).is_file():
            begun = read_manifest(self.parts.out)["request"]
            whole.refuse_other_request(self.parts.out, begun, self.parts.request)
            # Left by a process that was killed.
            shutil.rmtree(self.parts.directory, ignore_errors=True)
            return True
        plan = self.parts.directory / PLAN
        if not plan.is_file():
            raise ValueError(f"out={self.parts.out}: {_NO_PLAN}")
        begun = json.loads(plan.read_text("utf-8"))
        whole.refuse_other_request(self.parts.out, begun, self.parts.request)
        return False

    def begin(self) -> None:
        """Writes the plan, unless another process has done so."""
        try:
            self.parts.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.parts.directory}: cannot be made: {error.strerror}") from error
        if not (self.parts.directory / PLAN).exists():
            self.parts.write(PLAN, json.dumps(self.parts.request))

    def make(self, shards: int, shard: int | None) -> None:
        """Makes all that one process has to make; None: all processes."""
        own = [i for i in range(len(self.parts.files)) if shard is None or i % shards == shard]
        others = [i for i in range(len(self.parts.files)) if i not in set(own)]
        others = others[own[0] if own else 0 :] + others[: own[0] if own else 0]
        for part in [*own, *others]:
            if not self.parts.path("survey", part, "npz").exists():
                say(f"reading {self.parts.files[part].path}")
                self._survey(part)
        self._find_copies([b for b in range(self.parts.n_buckets) if b % shards == (shard or 0)])
        self._find_copies(list(range(self.parts.n_buckets)))
        self._check_sides()
        tokenizer = self._tokenizer()
        for part in own:
            if not self.parts.path("part", part, "json").exists():
                say(f"tokenising {self.parts.files[part].path}")
                pack(self.parts, part, tokenizer)

    def merge(self, shards: int) -> bool:
        """Writes the manifest if all parts are done; whether they are."""
        if missing := self.parts.missing():
            done = len(self.parts.files) - len(missing)
            others = ", ".join(map(str, sorted({part % shards for part in missing})))
            say(f"{done} of {len(self.parts.files)} parts are done; the shards {others} are not")
            return False
        entries = [json.loads(self.parts.path("part", i, "json").read_text("utf-8")) for i in
                   range(len(self.parts.files))]  # fmt: skip
        text = json.dumps(manifest(self.parts, entries), indent=1, ensure_ascii=False)
        with whole_file(self.parts.out / MANIFEST) as temporary:
            temporary.write_text(text + "\n", "utf-8")
        shutil.rmtree(self.parts.directory, ignore_errors=True)
        return True

    def _survey(self, part: int) -> None:
        rows = list(self.parts.rows(part))
        found = survey.survey(rows)
        if "tokenizer" not in self.parts.request:
            texts = self._sample(part, found, [document.text for _, document in rows])
            self.parts.write(self.parts.path("sample", part, "json").name, json.dumps(texts))
        found.save(self.parts.path("survey", part, "npz"))

    def _sample(self, part: int, found: Survey, texts: list[str]) -> list[str]:
        """Texts to train the tokenizer on, in the order of their hashes: a random choice."""
        if self.parts.files[part].split == VALIDATION:
            return []
        in_order = np.lexsort((found.hash_N2[:, 1], found.hash_N2[:, 0]))
        held_out_N = survey.is_held_out(found.hash_N2) & (not self.parts.says_split)
        wanted = self.parts.request["domains"]
        names = [*found.names, None]
        left = SAMPLE_BYTES // len(self.parts.files) + 1
        chosen: dict[str, None] = {}
        for i in in_order.tolist():
            name = names[found.domain_N[i]]
            is_read = name is not None and (not wanted or name in wanted) and not held_out_N[i]
            if left > 0 and is_read and texts[i] not in chosen:
                chosen[texts[i]] = None
                left -= len(texts[i].encode("utf-8"))
        return list(chosen)

    def _find_copies(self, buckets: list[int]) -> None:
        missing = [b for b in buckets if not self.parts.path("copies", b, "npz").exists()]
        if not missing:
            return
        found = survey.find_copies(
            (self.parts.load_survey(i) for i in range(len(self.parts.files))),
            [part.split == VALIDATION for part in self.parts.files],
            self.parts.domains,
            missing,
            self.parts.n_buckets,
            keep_repeats=self.parts.request.get("keep_repeats", False),
            across_domains=self.parts.request.get("dedup_across_domains", False),
        )
        for bucket, copies in found.items():
            copies.save(self.parts.path("copies", bucket, "npz"))

    def _check_sides(self) -> None:
        """Refuses a corpus with nothing to train on or to hold out, before it is tokenised."""
        n_documents = dict.fromkeys(SPLITS, 0)
        for part in range(len(self.parts.files)):
            held_out_N = self.parts.held_out(part, self.parts.load_survey(part))
            for i, on_side in enumerate((~held_out_N, held_out_N)):
                n_documents[SPLITS[i]] += int(np.sum(on_side & self.parts.stays(part)))
        for split, purpose in zip(SPLITS, ("train on", "hold out"), strict=True):
            if not n_documents[split]:
                raise ValueError(
                    f"corpus {self.parts.request['corpus']}: holds no text to {purpose}; 5 % of the"
                    " documents are held out by their hashes, or those of validation=PATH"
                )

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer that was given, or one trained on the samples of all parts."""
        path = self.parts.out / TOKENIZER
        if not path.exists():
            is_given = "tokenizer" in self.parts.request
            texts = [
                text
                for i in range(0 if is_given else len(self.parts.files))
                for text in json.loads(self.parts.path("sample", i, "json").read_text("utf-8"))
            ]
            made = whole.tokenizer_of(self.parts.request, texts)
            with whole_file(path) as temporary:
                temporary.write_text(made.to_json(), "utf-8")
        return Tokenizer.load(path)

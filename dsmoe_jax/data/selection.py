"""The text of a request: read, without copies, split into what is trained on and held out."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_jax.data import own_text, sources, user_files
from dsmoe_jax.data.documents import (
    Document,
    OtherDomains,
    Split,
    choose,
    choose_with_validation,
    digest,
)
from dsmoe_jax.data.request import Request, check_domains, kind_of
from dsmoe_jax.data.split_names import TRAIN, VALIDATION
from dsmoe_jax.data.text_formats import TEXT_COLUMN


@dataclass
class Text:
    """The chosen texts and their origins, by domain; and what the user should know of them."""

    splits: dict[str, Split]
    origins: dict[str, list[dict[str, str]]]
    notes: list[str]


def read_text(request: Request) -> Text:
    """The texts of a request, split into those to train on and those to hold out.

    Says on stderr what is read and what is left out.

    Raises:
      ValueError: if the text cannot be read, is too little or not what the request was made for.
    """
    built_in = request["corpus"] in sources.CORPORA
    text = _read_built_in(request) if built_in else _read_own_text(request)
    text.notes += _left_out(list(text.splits.values()))
    for note in text.notes:
        say(note)
    return text


def _left_out(splits: list[Split]) -> list[str]:
    """A line on the documents that were left out; none, if none was."""
    return left_out_note(
        sum(len(split.train) + len(split.validation) for split in splits),
        repeats=sum(split.repeats for split in splits),
        in_other_domains=sum(split.in_other_domains for split in splits),
        blank=sum(split.blank for split in splits),
        held_out_too=sum(split.held_out_too for split in splits),
    )


def left_out_note(
    kept: int, *, repeats: int, in_other_domains: int, blank: int, held_out_too: int
) -> list[str]:
    """A line on the documents that were left out; none, if none was."""
    counts = {
        "exact copies of others (keep_repeats keeps them)": repeats,
        "exact copies of others in other domains": in_other_domains,
        "without text": blank,
        "held out too (of those to train on)": held_out_too,
    }
    parts = [f"{count:,} {what}" for what, count in counts.items() if count]
    read = kept + sum(counts.values())
    return [f"left out of {read:,} documents: {', '.join(parts)}"] if parts else []


def _read_built_in(request: Request) -> Text:
    text = Text({}, {}, [])
    table = sources.CORPORA[request["corpus"]].known
    others = OtherDomains()
    for name in request["domains"]:
        say(f"reading {name}")
        documents = (d for part in table[name] for d in part.documents())
        text.splits[name] = _choose(documents, name, request, others)
        text.origins[name] = [part.describe() for part in table[name]]
    return text


def _read_own_text(request: Request) -> Text:
    path = request["corpus"]
    say(f"reading {user_files.shown(path)}")
    to_train = not request.get("to_measure", False)
    found = own_text.find(path, request.get("validation"), to_train=to_train)
    column = request.get("text_column", TEXT_COLUMN)
    read = kind_of(request).read
    train = user_files.read_documents(found.of(TRAIN), column, read)
    validation = user_files.read_documents(found.of(VALIDATION), column, read)
    read = {TRAIN: train, VALIDATION: validation}
    if own_text.fingerprint_of_read(found, read) != request["sha256"]:
        raise ValueError(f"corpus {path}: has changed while it was read; do it again")
    names = check_domains(request["domains"], train | validation) or sorted(train | validation)
    there = train if to_train else validation
    if not any(d.text.strip() for documents in there.values() for d in documents):
        raise ValueError(f"corpus {path}: empty, its files hold no text")
    if found.of("validation"):
        splits = _choose_with_validation(names, train, validation, request)
    else:
        others = OtherDomains()
        splits = {name: _choose(train[name], name, request, others) for name in names}
    origin = {"source": str(path), "sha256": request["sha256"], "licence": "yours"}
    return Text(splits, {name: [origin] for name in names}, found.notes())


def _choose(
    documents: Iterable[Document], name: str, request: Request, others: OtherDomains
) -> Split:
    """The split of a domain, without copies of documents of the domains before if asked for."""
    if request.get("dedup_across_domains", False):
        documents = others.without_copies(documents, name)
    split = choose(documents, name, **_limits(request))
    return replace(split, in_other_domains=others.left_out)


def _choose_with_validation(
    names: list[str],
    train: dict[str, list[Document]],
    validation: dict[str, list[Document]],
    request: Request,
) -> dict[str, Split]:
    """The split that the user gave, by domain; a domain may be on one side only."""
    held_out = {digest(d.text) for documents in validation.values() for d in documents}
    others = OtherDomains(held_out), OtherDomains()
    splits = {}
    for name in names:
        to_train: Iterable[Document] = train.get(name, [])
        to_hold_out: Iterable[Document] = validation.get(name, [])
        if request.get("dedup_across_domains", False):
            to_train = others[0].without_copies(to_train, name)
            to_hold_out = others[1].without_copies(to_hold_out, name)
        split = choose_with_validation(to_train, to_hold_out, held_out, **_limits(request))
        n_others = sum(other.left_out for other in others)
        splits[name] = replace(split, in_other_domains=n_others)
    for part, purpose in (
        ("train", "to train on that is not held out"),
        ("validation", "to hold out"),
    ):
        if part == "train" and request.get("to_measure", False):
            continue
        if not any(getattr(split, part) for split in splits.values()):
            raise ValueError(f"corpus {request['corpus']}: holds no text {purpose}")
    return splits


def _limits(request: Request) -> dict[str, Any]:
    """The keywords of `choose` and `choose_with_validation` that are the user's."""
    return {
        "max_bytes": request["max_bytes_per_domain"],
        "keep_repeats": request.get("keep_repeats", False),
    }


def say(message: str) -> None:
    """Prints a line on stderr."""
    print(message, file=sys.stderr, flush=True)

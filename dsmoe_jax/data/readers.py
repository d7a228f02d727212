"""Readers: the members of an archive -> documents. One small function for each kind of source."""

import ast
import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from dsmoe_jax.data.documents import Document, cut

Members = Iterable[tuple[str, bytes]]


def whole_files(members: Members) -> Iterator[Document]:
    """One document a file; test files are left out."""
    for name, content in members:
        if "tests" not in PurePosixPath(name).parts:
            yield Document(content.decode("utf-8"))


def long_files(members: Members) -> Iterator[Document]:
    """Files without boundaries of their own, cut at line ends."""
    for _, content in members:
        for piece in cut(content.decode("utf-8")):
            yield Document(piece)


def plays(members: Members) -> Iterator[Document]:
    """One document a scene; a play is held out as a whole, since its scenes share a story."""
    for name, content in members:
        for scene in re.split(r"(?m)^(?=### )", content.decode("utf-8")):
            yield Document(scene, group=name)


def longest_literal(members: Members) -> Iterator[Document]:
    """The longest string literal of a Python file (parsed, not run), cut at line ends."""
    for _, content in members:
        literals = [
            node.value
            for node in ast.walk(ast.parse(content))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        for piece in cut(max(literals, key=len).strip()):
            yield Document(piece)


def news_table(members: Members) -> Iterator[Document]:
    """Title and text of each row of a zipped CSV; articles of one title are near-duplicates."""
    for row in _rows(members):
        title = row["title"].strip()
        yield Document(f"{title}\n\n{row['text'].strip()}\n", group=title.lower())


def speech_table(members: Members) -> Iterator[Document]:
    """The `text` of each row of a zipped CSV: one speech. Interjections are left out."""
    for row in _rows(members):
        if len(row["text"]) >= 80:
            yield Document(row["text"].strip() + "\n")


def _rows(members: Members) -> Iterator[dict[str, str]]:
    for _, content in members:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in sorted(archive.namelist()):
                text = archive.read(name).decode("utf-8-sig")
                yield from csv.DictReader(io.StringIO(text, newline=""))


# `word/tag`; a name of several words is `[word/tag word/tag]tag`.
_TAG = re.compile(r"(?m)^\[|/[A-Za-z]+(?:\][A-Za-z]+)?(?:[ \t]+\[?|[ \t\r]*$)")


def tagged_news(members: Members) -> Iterator[Document]:
    """Chinese news with `word/tag` pairs: the tags and the blanks between words dropped."""
    for _, content in members:
        for piece in cut(_TAG.sub("", content.decode("utf-8"))):
            yield Document(piece)


def one_per_line(members: Members) -> Iterator[Document]:
    """One document a line."""
    for _, content in members:
        for line in content.decode("utf-8").splitlines():
            yield Document(line.strip() + "\n" if line.strip() else "")


_FORMULA = re.compile(r":math:|\.\. math::|\$")


def docstrings_with_formulas(members: Members) -> Iterator[Document]:
    """Docstrings that hold LaTeX; those of one file stay on one side of the split."""
    for name, content in members:
        source = content.decode("utf-8")
        # Parsing is the slow part: files without a formula are skipped.
        if "tests" not in PurePosixPath(name).parts and _FORMULA.search(source):
            for text in _docstrings(ast.parse(source)):
                if _FORMULA.search(text):
                    yield Document(text + "\n", group=name)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in order."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child)


def dialogues(members: Members) -> Iterator[Document]:
    """Conversations of the corpus's flat YAML (`- - question`, `  - answer`), one document each.

    A file is one topic in one language, where answers repeat: it is one group.
    """
    for name, content in members:
        turns: list[str] = []
        for line in content.decode("utf-8").splitlines():
            opens = line.startswith("- - ")
            if opens and turns:
                yield Document("\n".join(turns) + "\n", group=name)
                turns = []
            if opens or (turns and line.startswith("  - ")):
                turns.append(line[4:].strip().strip("'\"").replace("''", "'"))
            elif turns and line.startswith("   "):  # a folded scalar goes on
                turns[-1] += " " + line.strip().strip("'\"")
        if turns:
            yield Document("\n".join(turns) + "\n", group=name)


def service_documentation(members: Members) -> Iterator[Document]:
    """The `documentation` fields of gzipped service models, HTML tags dropped; one a service."""
    for name, content in members:
        found: list[str] = []
        _collect(json.loads(gzip.decompress(content)), found)
        service = PurePosixPath(name).parts[-3]
        for piece in cut("\n".join(dict.fromkeys(found)) + "\n"):
            yield Document(piece, group=service)


def _collect(node: object, found: list[str]) -> None:
    """Appends every `documentation` string below `node` as plain text."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                text = re.sub(r"<[^>]+>", "", value).strip()
                if len(text) > 100:
                    found.append(text)
            else:
                _collect(value, found)
    elif isinstance(node, list):
        for value in node:
            _collect(value, found)

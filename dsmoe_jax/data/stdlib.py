"""Text of the Python installation itself: the corpus that needs no download.

It depends on the Python version, which the manifest records. So it is for tests and first steps;
results worth keeping are measured on the downloaded corpora.
"""

import functools
import importlib
import inspect
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from dsmoe_jax.data.documents import Document

# Tests and vendored trees are not always installed; encodings are near-identical tables.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3",
            "ensurepip", "encodings", "pydoc_data", "turtledemo", "__pycache__"}  # fmt: skip


def python_sources() -> Iterator[Document]:
    """The standard library's modules, one document a file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = path.name.startswith("_sysconfigdata") or parts[0].startswith("config-")
        if not generated and _SKIPPED.isdisjoint(parts):
            yield Document(path.read_text("utf-8"))


def language_reference() -> Iterator[Document]:
    """The chapters of the language reference that `help()` shows, one document a topic."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Document(topics[name])


def builtin_docstrings() -> Iterator[Document]:
    """Docstrings of the modules written in C: not part of `python_sources`.

    One document a class or function; a class's comes with those of its methods.
    """
    for name in sorted(sys.builtin_module_names):
        if name in ("antigravity", "this"):
            continue
        with warnings.catch_warnings():  # some modules are deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            if inspect.isclass(value) or inspect.isroutine(value):
                text = _documented(f"{name.lstrip('_')}.{attribute}", value)
                if len(text) > 100:
                    yield Document(text, group=attribute)


def _documented(name: str, value: object) -> str:
    """`name`, its docstring and, for a class, the docstrings that it defines itself."""
    lines = [name, value.__doc__ if isinstance(value.__doc__, str) else ""]
    if inspect.isclass(value):
        for attribute, member in sorted(vars(value).items()):
            doc = getattr(member, "__doc__", None)
            if not attribute.startswith("_") and isinstance(doc, str):
                lines += [f"{name}.{attribute}", doc]
    return "\n".join(lines)


@functools.cache
def _named_characters() -> list[str]:
    """`character  code  NAME` of the scripts' letters and signs, CJK included."""
    lines = []
    for code in range(0x20, 0x20000):
        name = unicodedata.name(chr(code), "")
        # Of the 70,000 ideographs and syllables, whose names are only numbers, take a few.
        numbered = name.startswith(("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLL", "NUSHU", "TANGUT"))
        if name and (not numbered or code % 16 == 0):
            lines.append(f"{chr(code)}  {code:04X}  {name}\n")
    return lines


def character_names(lines_per_document: int = 64) -> Iterator[Document]:
    """The Unicode character table, in every script; one document for each run of characters."""
    lines = _named_characters()
    for start in range(0, len(lines), lines_per_document):
        yield Document("".join(lines[start : start + lines_per_document]))

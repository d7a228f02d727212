"""Loss on text of one's own, in the tokens of a run."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.data.corpus import TOKENIZER
from dsmoe_jax.data.opening import open_to_measure
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train
from tests.tools.forked import run_all

TEXTS = {  # each domain fits into one sequence, so that no document is cut
    "poems/a.txt": "Tyger Tyger, burning bright",
    "poems/test.txt": "Tyger Tyger, burning bright",
    "code/validation.txt": "def f(x):\n    return x + 1  # Größe",
}


@pytest.fixture(scope="module")
def run(finished_run):
    return load_run(finished_run[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    for name, text in TEXTS.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "texts"


def to_measure(path, run):
    corpus = run.corpus
    return open_to_measure(str(path), corpus.directory / TOKENIZER, corpus.sequence_length)


def nats(run, text):
    """Nats of all tokens of a text and of its end, and their number; one document at a time."""
    eos = run.corpus.tokenizer.eos_id
    ids = [eos, *run.corpus.tokenizer.encode_batch([text])[0], eos]
    batch = {
        "tokens_BS": jnp.array([ids[:-1]]),
        "segment_ids_BS": jnp.ones((1, len(ids) - 1), jnp.int32),
        "positions_BS": jnp.arange(len(ids) - 1)[None],
    }
    logits_SV = np.asarray(run.model.forward(ModelInputs.of_batch(batch)).logits_BSV[0], np.float64)
    log_sums_S = np.log(np.exp(logits_SV).sum(axis=1))
    return float((log_sums_S - logits_SV[range(len(ids) - 1), ids[1:]]).sum()), len(ids) - 1


def test_every_token_of_every_file_counts(run, folder):
    """Copies too, and files that are for testing by name; domains are folders."""
    corpus = to_measure(folder, run)
    assert corpus.num_records("train") == 0
    found = evaluate(run.model, corpus, batch_size=2)
    for domain in ("code", "poems"):
        texts = [text for name, text in TEXTS.items() if name.startswith(domain)]
        sums = [nats(run, text) for text in texts]
        total, tokens = (sum(column) for column in zip(*sums, strict=True))
        n_bytes = sum(len(text.encode()) for text in texts)
        row = found["domains"][domain]
        assert (row["tokens"], row["bytes"]) == (tokens, n_bytes)
        # float32 logits of about 6 nats: an error of 1e-6 of each is 1e-5 of their mean at most.
        assert math.isclose(row["loss"], total / tokens, rel_tol=1e-4)
        bits = total / math.log(2) / n_bytes
        assert math.isclose(row["bits_per_byte"], bits, rel_tol=1e-4)


def test_a_single_short_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text("a")
    found = evaluate(run.model, to_measure(tmp_path / "x.txt", run))
    assert (found["tokens"], found["bytes"]) == (2, 1)


def test_a_prepared_corpus_keeps_its_held_out_part(run, finished_run):
    corpus = to_measure(run.corpus.directory, run)
    assert corpus.fingerprint == run.corpus.fingerprint
    assert evaluate(run.model, corpus, batch_size=4, max_batches=2) == {
        key: value for key, value in finished_run[1].evaluation.items() if key != "step"
    }


def test_other_tokens_are_refused(run, tmp_path):
    other = prepare("stdlib", tmp_path / "other", 300, 64, max_bytes_per_domain=20_000)
    with pytest.raises(ValueError, match="tokenizer is not that of the corpus"):
        to_measure(other.directory, run)
    other = prepare("stdlib", tmp_path / "short", 512, 32, max_bytes_per_domain=60_000)
    with pytest.raises(ValueError, match=r"sequence_length=64: .* is packed for 32"):
        to_measure(other.directory, run)


def test_the_command(finished_run, folder, tmp_path):
    """It prints and writes what it measured; the workdir stays as it is."""
    workdir = finished_run[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}

    out = tmp_path / "found.json"
    flags = (
        (f"--corpus={folder}", "--json", f"--out={out}"),
        (f"--corpus={tmp_path / 'none'}", f"--out={tmp_path / 'new.json'}"),
        (f"--out={out}",),
    )
    done, missing, again = run_all([["evaluate", f"--workdir={workdir}", *f] for f in flags])
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads(out.read_text()) == found
    assert (found["corpus"], set(found["domains"])) == (str(folder), {"code", "poems"})
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert (missing.code, missing.out) == (2, "")
    assert missing.err.startswith(f"error: --corpus={tmp_path / 'none'}: ")
    assert f"--out={out}: exists already" in again.err


def test_a_run_starts_from_another_on_other_text_of_its_tokenizer(
    run, finished_run, folder, tiny_config, tmp_path
):
    """Fine-tuning: its first loss is that of the model on the new text, its optimizer is new."""
    tokenizer = str(run.corpus.directory / "tokenizer.json")
    for i in range(40):
        (folder / "poems" / f"{i}.txt").write_text(f"{i}: " + TEXTS["poems/a.txt"] * 10)
    other = prepare(str(folder), tmp_path / "other", None, 64, tokenizer=tokenizer)
    config = tiny_config(
        **{
            "data.corpus": str(other.directory),
            "train.start_from": str(finished_run[0]),
            "train.steps": 3,
            "train.eval_every": None,
        }
    )
    train(config, tmp_path / "run", progress=False)
    fresh = replace(config, **{"train.start_from": None})
    train(fresh, tmp_path / "fresh", progress=False)
    before, *rows = read_rows(tmp_path / "run")
    assert before["step"] == 0
    assert rows[-1]["validation_loss"] < before["validation_loss"]
    fresh_rows = read_rows(tmp_path / "fresh")
    assert rows[0]["loss"] < fresh_rows[0]["loss"] - 0.2, "the model has learned letters"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02, "and goes on with this text"
    rates = [[row["learning_rate"] for row in log] for log in (rows, fresh_rows)]
    assert rates[0] == rates[1], "with a schedule of its own"

"""Fine-tuning on conversations, from a trained run to the numbers before and after."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import replace, stage_of
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config, read_evaluation
from dsmoe_jax.training.derived import derive
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.stages import StageRun
from tests.tools.trees import by_path
from tests.training.test_loop import numbers, parameters


@pytest.fixture(scope="module")
def base(finished_run):
    """The workdir of a trained run."""
    return finished_run[0]


@pytest.fixture(scope="module")
def usage(base, tmp_path_factory):
    """A file as `evaluate --out` writes it: the load of the experts by layer."""
    path = tmp_path_factory.mktemp("usage") / "usage.json"
    path.write_text(json.dumps({"load": [[5, 1, 1, 3], [2, 2, 6, 0]]}))
    return path


@pytest.fixture(scope="module")
def config(base, usage, tiny_config):
    """Two passes over part of the tasks, the most used experts alone."""
    return tiny_config(
        **{
            "data.corpus": "tasks",
            "data.domains": ("repetition",),
            "train.start_from": str(base),
            "train.epochs": 1.5,
            "train.trainable.part": "chosen_experts",
            "train.trainable.most_used_in": str(usage),
            "train.trainable.share": 0.5,
            "train.eval_every": None,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 0,
        }
    )


@pytest.fixture(scope="module")
def tuned(config, tmp_path_factory):
    """The workdir of the fine-tuned run."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    train(config, workdir, progress=False)
    return workdir


def test_what_follows_from_files_is_in_its_config(config, tuned, base):
    there = read_config(tuned)
    corpus = open_corpus(there.data)
    assert there.data.tokenizer == str(base / "tokenizer.json")
    assert corpus.tokenizer.to_json() == (base / "tokenizer.json").read_text()
    assert there.train.steps == -(-3 * corpus.num_records("train") // (2 * 4))
    assert there.train.trainable.experts == ((0,), (2,))
    assert derive(there) == there, "the same command goes on with it"
    assert train(config, tuned, progress=False).resumed_from == there.train.steps


def test_the_loss_of_answers_before_and_after(tuned, base):
    evaluation = read_evaluation(tuned)
    first, *_, last = read_rows(tuned)
    assert (first["step"], last["step"]) == (0, evaluation["step"])
    before = evaluation["before"]
    assert before == {
        "loss": first["validation_loss"],
        "bits_per_byte": first["validation_bits_per_byte"],
    }
    assert evaluation["loss"] == last["validation_loss"]
    assert evaluation["loss"] < before["loss"] - 0.05
    (domain,) = open_corpus(read_config(tuned).data).manifest["domains"]
    assert evaluation["tokens"] == domain["answer_tokens"]["validation"] > 0


def test_the_loss_is_that_of_a_plain_formula(tuned, base):
    """The first batch, from the logits; answers follow "Assistant:", up to the end of text."""
    config = read_config(tuned)
    corpus = open_corpus(config.data)
    batch = StageRun(stage_of(config, 1), corpus).next_batch(1)
    model = load_run(base).model
    logits_BSV = jax.jit(lambda x: model.forward(x).logits_BSV)(ModelInputs.of_batch(batch))
    log_p_BSV = np.asarray(jax.nn.log_softmax(logits_BSV))
    found = []
    for log_p_SV, targets_S in zip(log_p_BSV, batch["targets_BS"], strict=True):
        text = ""
        inside = False
        for log_p_V, target in zip(log_p_SV, targets_S, strict=True):
            if inside:
                found.append(-log_p_V[target])
            text += corpus.tokenizer.token(target)
            inside = text.endswith("Assistant:") or (inside and target != corpus.tokenizer.eos_id)
    assert len(found) == batch["loss_mask_BS"].sum()
    np.testing.assert_allclose(read_rows(tuned)[1]["loss"], np.mean(found), rtol=1e-5)


def test_only_the_chosen_experts_have_moved(tuned, base):
    old, new = (by_path(jax.device_get(nnx.state(load_run(w).model))) for w in (base, tuned))
    moved = {name for name, x in old.items() if (x != new[name]).any()}
    assert len(moved) == 3
    for name in moved:
        assert "_EFD" in name or "_EDF" in name
        changed_LE = (new[name] != old[name]).any(axis=(2, 3))
        np.testing.assert_array_equal(changed_LE, [[1, 0, 0, 0], [0, 0, 1, 0]])


def test_it_resumes_bit_for_bit(config, tuned, tmp_path):
    """From the last but one checkpoint, as if it had been killed after it."""
    workdir = shutil.copytree(tuned, tmp_path / "run")
    (workdir / "evaluation.json").unlink()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
    assert train(config, workdir, progress=False).resumed_from == steps[-2]
    assert numbers(workdir) == numbers(tuned)
    (_, a), (_, b) = parameters(workdir), parameters(tuned)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert read_evaluation(workdir) == read_evaluation(tuned)


def test_other_files_are_another_run(config, tuned, tmp_path):
    other = tmp_path / "usage.json"
    other.write_text(json.dumps({"load": [[1, 9, 0, 0], [9, 0, 0, 0]]}))
    changed = replace(config, **{"train.trainable.most_used_in": str(other)})
    with pytest.raises(ValueError, match=r"another config \(train\.trainable\.experts: \(\(0,\),"):
        train(changed, tuned, progress=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file; evaluate --out=FILE writes one"),
        ('{"loss": 3}', "has no load by layer; must be results of evaluate --out"),
        ('{"load": [[1, 2], [0, 0]]}', "has no load by layer; must be"),
        ('{"load": [[1, "2"], [1, 0]]}', "has no load by layer; must be"),
        ('{"load": 3}', "has no load by layer; must be"),
    ],
)
def test_a_file_without_a_load_is_refused(config, tmp_path, content, says):
    file = tmp_path / "usage.json"
    if content is not None:
        file.write_text(content)
    changed = replace(config, **{"train.trainable.most_used_in": str(file), "train.epochs": None})
    with pytest.raises(
        ValueError, match=rf"^train\.trainable\.most_used_in='.*usage.json': {says}"
    ):
        derive(changed)


def test_keys_that_contradict_each_other(config):
    changed = replace(config, **{"train.trainable.experts": ((1,), (1,)), "train.epochs": None})
    with pytest.raises(ValueError, match=r"^train\.trainable\.experts=.*usage.json says \(\(0,\)"):
        derive(changed)
    stages = {"train.stages.share": (0.5, 0.5), "train.stages.train.global_batch_size": (2, 4)}
    with pytest.raises(ValueError, match=r"^train\.epochs=1\.5: needs a train\.global_batch_size"):
        derive(replace(config, **stages))

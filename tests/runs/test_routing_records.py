"""Routing recorded in one run and replayed in another: the same loads, losses and gradients."""

import json
import re
import shutil

import chex
import numpy as np
import pytest
from flax import nnx

from benchmarks import recorded
from dsmoe_jax.data.pipeline import validation_batches
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.routing_records import MANIFEST, _has_holes, belongs_to, of_held_out
from dsmoe_jax.training.loop import train
from tests.tools.forked import run_all
from tests.tools.trees import REORDERED

SHORT = {"train.steps": 4, "train.eval_every": 2, "train.checkpoint_every": 3}
FIXED = {
    "model.moe.balance.expert": None,
    "model.moe.balance.router_z": None,
    "model.moe.num_experts_per_tok": 1,
}


DENSE = {
    "model.moe.router.name": "topk",
    "model.moe.n_routed_experts": 0,
    "model.moe.num_experts_per_tok": 0,
    "train.record_routing": True,
}


def losses(workdir):
    keys = ("loss", "grad_norm", "validation_loss")
    return [{k: row.get(k) for k in keys} for row in read_rows(workdir)]


def assert_same_to_rounding(found, wanted):
    """A replay is another program, in which XLA may add up in another order."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        chex.assert_trees_all_close(a, b, rtol=REORDERED)


@pytest.fixture(scope="module")
def learned(tiny_config, tmp_path_factory):
    """A recorded run of the paper's router."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    train(tiny_config(**SHORT, **{"train.record_routing": True}), workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def hashed(tiny_config, tmp_path_factory):
    """A recorded run of a router without parameters, with dropping."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    hashed = {"model.moe.router.name": "hash", "model.moe.drop.capacity_factor": 0.9}
    config = {**SHORT, **FIXED, **hashed, "train.record_routing": True}
    train(tiny_config(**config), workdir, progress=False)
    return workdir


def test_what_is_recorded(hashed):
    """The experts' real work: a dropped assignment is unassigned, 4."""
    with np.load(hashed / "routing/train/00000004.npz") as arrays:
        ids, gates = arrays["ids_BLSK"], arrays["gates_BLSK"]
    assert ids.shape == gates.shape == (4, 2, 64, 1)
    assert (ids == 4).any(), "some are dropped"
    np.testing.assert_array_equal(gates, ids < 4)
    assert (hashed / "routing/validation-00000002/00000002.npz").is_file()


def test_recorded_experts_with_live_gates_give_the_same_run(learned, tiny_config, tmp_path):
    """The experts are forced, the gates' and balance terms' gradients flow as they did."""
    replays = {
        "model.moe.router.name": "replay_ids",
        "train.replay_routing": str(learned / "routing"),
    }
    train(tiny_config(**SHORT, **replays), tmp_path / "run", progress=False)
    assert_same_to_rounding(losses(tmp_path / "run"), losses(learned))


GSHARD = {
    "model.moe.router.name": "gshard",
    "model.moe.router.options.random_second_expert": True,
    "model.moe.router.norm_topk_prob": True,
}
WITH_HOLES = {
    "dropping": {"model.moe.drop.capacity_factor": 0.7},
    "dropping, normalised": {
        "model.moe.drop.capacity_factor": 0.7,
        "model.moe.router.norm_topk_prob": True,
    },
    "random second": GSHARD,
    "both": {**GSHARD, "model.moe.drop.capacity_factor": 0.7},
}
KEYS = ("loss", "grad_norm", "expert_balance", "router_z", "router_gate_sum", "load")


EVERY_DAY = ("dropping", "both")  # each costs two compiled steps
CASES = [
    pytest.param(case, id=name, marks=() if name in EVERY_DAY else pytest.mark.full)
    for name, case in WITH_HOLES.items()
]


@pytest.mark.parametrize("recorded", CASES)
def test_a_recording_with_holes_gives_the_gates_and_terms_of_its_run(
    tiny_config, tmp_path, recorded
):
    """One that lacks what was dropped, as they were written before, is refused."""
    few = {"train.steps": 2, "train.eval_every": None, "optimizer.warmup_steps": 0}
    train(
        tiny_config(**few, **recorded, **{"train.record_routing": True}),
        tmp_path / "run",
        progress=False,
    )
    normalised = recorded.get("model.moe.router.norm_topk_prob", False)
    replays = {
        "model.moe.router.name": "replay_ids",
        "model.moe.router.norm_topk_prob": normalised,
        "train.replay_routing": str(tmp_path / "run/routing"),
    }
    train(tiny_config(**few, **replays), tmp_path / "replay", progress=False)
    rows, wanted = read_rows(tmp_path / "replay"), read_rows(tmp_path / "run")
    for row, want in zip(rows, wanted, strict=True):
        dropped = want.get("dropped_by_expert", 0)  # not there without a policy
        want["load"] = np.subtract(want["load"], dropped).tolist()
        found = {key: row[key] for key in KEYS}
        chex.assert_trees_all_close(found, {key: want[key] for key in KEYS}, rtol=1e-5)
        assert sum(row.get("dropped", [0])) == 0
    with np.load(tmp_path / "run/routing/train/00000002.npz") as arrays:
        assert (arrays["ids_BLSK"] == 4).any()
        assert ("sent_BLSK" in arrays) == ("model.moe.drop.capacity_factor" in recorded)
        assert ("chosen_BLSK" in arrays) == (recorded.items() >= GSHARD.items())
    for path in (tmp_path / "run/routing/train").iterdir():
        with np.load(path) as arrays:
            old = {key: arrays[key] for key in ("ids_BLSK", "gates_BLSK")}
        np.savez(path, **old)
    message = r"train/00000001\.npz lacks choices that were dropped or left out, .* record .* anew"
    with pytest.raises(ValueError, match=message):
        train(tiny_config(**few, **replays), tmp_path / "again", progress=False)


def test_padding_is_no_hole():
    """It ends a sequence and is there in all layers; (B, L, S, K)."""
    ids = np.zeros((2, 3, 8, 2), np.int32)
    ids[1, :, 5:] = 4
    assert not _has_holes(ids, 4)
    for hole in ((0, 1, 7, 1), (0, 0, 7), (1, 2, 4, 0), (0, slice(None), 3)):
        damaged = ids.copy()
        damaged[hole] = 4
        assert _has_holes(damaged, 4), hole


def test_recorded_experts_and_gates_give_the_same_run(hashed, tiny_config, tmp_path):
    replays = {"model.moe.router.name": "replay", "train.replay_routing": str(hashed / "routing")}
    train(tiny_config(**SHORT, **FIXED, **replays), tmp_path / "run", progress=False)
    assert_same_to_rounding(losses(tmp_path / "run"), losses(hashed))


def test_the_replay_is_what_decides(hashed, tiny_config, tmp_path):
    """With the recorded experts exchanged the run is another one."""
    directory = tmp_path / "routing"
    for path in (hashed / "routing").rglob("*.npz"):
        target = directory / path.relative_to(hashed / "routing")
        target.parent.mkdir(parents=True, exist_ok=True)
        with np.load(path) as arrays:
            np.savez(target, ids_BLSK=4 - arrays["ids_BLSK"], gates_BLSK=arrays["gates_BLSK"])
    (directory / MANIFEST).write_text((hashed / "routing" / MANIFEST).read_text())
    replays = {"model.moe.router.name": "replay", "train.replay_routing": str(directory)}
    train(tiny_config(**SHORT, **FIXED, **replays), tmp_path / "run", progress=False)
    assert losses(tmp_path / "run")[0] != losses(hashed)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.steps": 5}, r"no step 5, train\.steps=5 must be at most 4"),
        ({"model.num_hidden_layers": 3}, r"recorded with layers=2, not 3"),
        ({"model.moe.n_routed_experts": 8}, r"recorded with experts=4, not 8"),
        ({"model.moe.num_experts_per_tok": 2}, r"recorded with experts_per_token=\[1\], not \[2\]"),
        ({"train.global_batch_size": 8}, r"batches of 4 sequences, not 8"),
        ({"train.seed": 1}, r"recorded with seed=0, not 1"),
        ({"train.eval_every": 1}, r"holds no batch 1 of validation-0000000[13]"),
        ({"train.replay_routing": "/none"}, r"no recorded routing there"),
        (
            {"train.replay_routing": None},
            r"routing=None: model\.moe\.router\.name='replay' needs the WORKDIR/routing of a run",
        ),
        ({"model.moe.router.name": "uniform"}, r"router\.name='uniform' replays nothing"),
        ({**DENSE, "train.replay_routing": None}, r"record_routing=True: there are no routed exp"),
    ],
)
def test_refused_before_the_first_step(hashed, tiny_config, tmp_path, change, message):
    replays = {"model.moe.router.name": "replay", "train.replay_routing": str(hashed / "routing")}
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny_config(**{**SHORT, **FIXED, **replays, **change}), tmp_path, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_file_of_another_shape_is_refused(hashed, tiny_config, tmp_path, axis):
    """Whatever the manifest says; replayed it would be another routing without a word."""
    directory = shutil.copytree(hashed / "routing", tmp_path / "routing")
    path = directory / "train/00000001.npz"
    with np.load(path) as arrays:
        np.savez(path, **{key: np.repeat(array, 2, axis) for key, array in arrays.items()})
    replays = {"model.moe.router.name": "replay", "train.replay_routing": str(directory)}
    found = [4, 2, 64, 1]
    found[axis] *= 2
    found = re.escape(str(tuple(found)))
    message = rf"train/00000001\.npz has ids of shape {found} and gates .*, not \(4, 2, 64, 1\)"
    with pytest.raises(ValueError, match=message):
        train(tiny_config(**SHORT, **FIXED, **replays), tmp_path / "run", progress=False)


def test_a_run_in_stages_and_micro_batches(tiny_config, tmp_path):
    """Every sequence gets its own routing back, whichever micro-batch it was computed in."""
    stages = {
        "train.stages.share": (0.5, 0.5),
        "train.stages.train.accumulation_steps": (1, 2),
        "train.stages.model.moe.num_experts_per_tok": (2, 1),
    }
    records, replays = tmp_path / "records", tmp_path / "replays"
    config = {**SHORT, **stages, "train.record_routing": True}
    train(tiny_config(**config), records, progress=False)
    for step, columns in ((2, 2), (3, 1)):
        with np.load(records / f"routing/train/{step:08}.npz") as arrays:
            assert arrays["ids_BLSK"].shape == (4, 2, 64, columns)
    recorded = str(records / "routing")
    config = {"model.moe.router.name": "replay_ids", "train.replay_routing": recorded}
    train(tiny_config(**SHORT, **stages, **config), replays, progress=False)
    assert_same_to_rounding(losses(replays), losses(records))
    with pytest.raises(ValueError, match=r"stages_after=\[0, 2\], not \[0\]"):
        train(tiny_config(**SHORT, **config), tmp_path / "another", progress=False)


def test_an_evaluation_by_itself_is_recorded(learned, tmp_path):
    """The command writes what the run wrote when it evaluated, and not over another recording."""
    command = ["evaluate", f"--workdir={learned}", "--json", "--batch_size=4", "--max_batches=2"]
    record = [*command, f"--record_routing={tmp_path / 'routing'}"]
    replay = [*command, f"--replay_routing={learned / 'routing/validation-00000004'}"]
    done, again, replayed = run_all([record, record, replay])
    assert done.code == 0, done.err
    by_run, by_command = learned / "routing", tmp_path / "routing"
    assert (by_command / MANIFEST).read_text() == (by_run / MANIFEST).read_text()
    for name in (f"validation-00000004/{i:08d}.npz" for i in (1, 2)):
        with np.load(by_run / name) as wanted, np.load(by_command / name) as found:
            np.testing.assert_array_equal(found["ids_BLSK"], wanted["ids_BLSK"])
            np.testing.assert_allclose(found["gates_BLSK"], wanted["gates_BLSK"], rtol=1e-6)
    path = by_command / "validation-00000004/00000001.npz"
    assert recorded.offsets_TE(path, 1, 100, 4, 2).shape == (100, 4), "a benchmark takes it"
    assert again.code == 2
    (line,) = again.err.strip().splitlines()
    assert "routing: exists already; name a new directory" in line
    assert json.loads(replayed.out)["loss"] == json.loads(done.out)["loss"]


def held_out(workdir, step, folder=None):
    """The held-out results of a checkpoint, with its own routing or that of a folder."""
    run, replays = load_run(workdir, step), (None, "validation")
    if folder is not None:
        replays = of_held_out(str(folder), run.config, run.corpus.fingerprint)
    graph, params, other = nnx.split(run.model, nnx.Param, ...)
    result = HeldOut(graph, run.corpus, 4, 2, None, replays[0]).measure(
        params, other, name=replays[1]
    )
    return run, {key: result[key] for key in ("loss", "load", "dropped")}


def test_one_step_evaluated_with_the_routing_of_another(learned, hashed, tmp_path):
    """Its own changes nothing, another one's is followed to the letter, whatever the router."""
    own, other = (learned / f"routing/validation-0000000{step}" for step in (4, 2))
    _, alone = held_out(learned, 4)
    assert held_out(learned, 4, own)[1] == alone
    run, followed = held_out(learned, 4, other)
    assert followed["loss"] != alone["loss"]
    ids, valid = [], []
    for i, batch in enumerate(validation_batches(run.corpus.directory, 4, 2), start=1):
        with np.load(other / f"{i:08d}.npz") as arrays:
            ids.append(arrays["ids_BLSK"])
        valid.append(batch["segment_ids_BS"] > 0)
    ids, valid = np.concatenate(ids), np.concatenate(valid)
    for layer, load in enumerate(followed["load"]):
        counts = np.bincount(ids[:, layer][valid].reshape(-1), minlength=4)
        np.testing.assert_array_equal(load, counts)
    for folder, message in (
        (learned / "routing/train", r"holds no held-out batches; name a folder validation-"),
        (learned / "routing/validation-00000003", r"holds no held-out batches"),
        (learned / "validation-00000004", r"no recorded routing there \(no manifest"),
        (hashed / "routing/validation-00000004", r"ids of shape .*, not \(4, 2, 64, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out(learned, 4, folder)


@pytest.mark.parametrize("junk", [b"junk", b"", b"PK\x03\x04", b"[1]", b"[" * 200_000])
def test_damaged_files_are_named(learned, tmp_path, junk):
    directory = shutil.copytree(learned / "routing", tmp_path / "routing")
    batch = directory / "validation-00000004/00000001.npz"
    batch.write_bytes(junk)
    with pytest.raises(ValueError, match=r"00000001\.npz: cannot be read, or is not a batch"):
        held_out(learned, 4, batch.parent)
    with pytest.raises(ValueError, match=r"00000001\.npz: cannot be read, or is not a batch"):
        recorded.offsets_TE(batch, 1, 100, 4, 2)
    (directory / MANIFEST).write_bytes(junk)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: not the manifest"):
        held_out(learned, 4, batch.parent)


def test_too_few_batches_are_refused_before_the_first(learned, tmp_path):
    directory = shutil.copytree(learned / "routing", tmp_path / "routing")
    (directory / "validation-00000004/00000002.npz").unlink()
    run = load_run(learned, 4)
    folder = str(directory / "validation-00000004")
    recording, name = of_held_out(folder, run.config, run.corpus.fingerprint)
    graph, params, other = nnx.split(run.model, nnx.Param, ...)
    some, seen = HeldOut(graph, run.corpus, 4, 2, None, recording), []
    with pytest.raises(ValueError, match=r"holds no batch 2 of validation-00000004"):
        some.measure(params, other, seen.append, name)
    assert seen == []


def test_a_benchmark_takes_it(learned, hashed):
    path = learned / "routing/train/00000001.npz"
    offsets_TE = recorded.offsets_TE(path, 1, 100, 4, 2)
    with np.load(path) as arrays:
        ids = arrays["ids_BLSK"][:, 1].reshape(-1, 2)[:100]
    np.testing.assert_array_equal(np.argsort(-offsets_TE, kind="stable")[:, :2], np.sort(ids))
    for bad, message in (
        ((path, 2, 100, 4, 2), r"--layer=2: .* layers 0 to 1"),
        ((path, 1, 1000, 4, 2), r"256 tokens with 2 experts each; the layer has 1000 with 2"),
        ((path, 1, 100, 2, 2), r"goes to expert 3, the layer has 2"),
        ((hashed / "routing/train/00000001.npz", 0, 256, 4, 1), r"goes to expert 4"),
    ):
        with pytest.raises(ValueError, match=message):
            recorded.offsets_TE(*bad)


def test_another_text_is_refused(hashed, tiny_config, tmp_path):
    directory = shutil.copytree(hashed / "routing", tmp_path / "routing")
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | {"corpus": "another"}))
    replays = {"model.moe.router.name": "replay", "train.replay_routing": str(directory)}
    with pytest.raises(ValueError, match=r"recorded with corpus=another, not \w+"):
        train(tiny_config(**SHORT, **FIXED, **replays), tmp_path / "run", progress=False)


def test_the_manifest_counts_moe_layers_and_columns(tiny_config):
    """No dense layers; expert choice has a column for each expert."""
    config = tiny_config(
        **{"model.first_k_dense_replace": 1, "model.moe.router.name": "expert_choice",
           "model.moe.balance.expert": None}
    )  # fmt: skip
    belongs = belongs_to(config, "text")
    assert (belongs["layers"], belongs["experts_per_token"]) == (1, [4])


def test_the_manifest_names_what_it_belongs_to(hashed):
    manifest = json.loads((hashed / "routing" / MANIFEST).read_text())
    assert manifest["layers"] == 2
    assert manifest["sequence_length"] == 64

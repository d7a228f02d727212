"""Loads of experts from what runs leave behind, and loads of other models."""

import numpy as np
import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.runs import json_files, loads
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.routing_records import Recorder, belongs_to, validation_name
from tests.tools.tiny import tiny

CONFIG = tiny()
# Two layers, two batches of one sequence of two tokens; 4 is unassigned.
IDS_LBSK = np.array([[[[0, 1], [0, 4]]], [[[3, 2], [3, 1]]]])


@pytest.fixture
def recorded(tmp_path):
    recorder = Recorder(tmp_path / "routing", belongs_to(CONFIG, "text"))
    for number, ids in ((1, IDS_LBSK), (2, (IDS_LBSK + 1) % 5)):
        gates = np.arange(1, 9, dtype=np.float32).reshape(ids.shape)
        routing = RecordedRouting(ids, gates, ids, ids)
        recorder.write(validation_name(3), number, routing)
    return tmp_path / "routing" / validation_name(3)


def test_recorded_routing(recorded):
    load_SLE = loads.read(str(recorded), CONFIG, "--loads")
    assert load_SLE[0].tolist() == [[2, 1, 0, 0], [0, 1, 1, 2]]
    assert load_SLE[1].tolist() == [[1, 2, 1, 0], [0, 0, 1, 1]]


def test_recorded_gates(recorded):
    """By hand: of the first layer the gates are 1 to 4, the last of which has no expert."""
    mass_SLE = loads.read(str(recorded), CONFIG, "--loads", loads.GATES)
    assert mass_SLE[0].tolist() == [[4, 2, 0, 0], [0, 8, 6, 12]]


def test_logs_and_results(finished_run):
    run = finished_run[0]
    rows = loads.read(str(run / "metrics.jsonl"), CONFIG, "--loads")
    assert rows.tolist() == [row["load"] for row in read_rows(run)]
    (held_out,) = loads.read(str(run / "evaluation.json"), CONFIG, "--loads")
    assert held_out.tolist() == json_files.read(run / "evaluation.json")["load"]
    (mass_LE,) = loads.read(str(run / "evaluation.json"), CONFIG, "--loads", loads.GATES)
    assert (mass_LE < held_out).all()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no gate mass of experts$"):
        loads.read(str(run / "metrics.jsonl"), CONFIG, "--loads", loads.GATES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train.seed": 7}, r"recorded with seed=0, not 7; must be of this model"),
        ({"model.moe.n_routed_experts": 8}, r"recorded with experts=4, not 8"),
        ({"model.num_hidden_layers": 3}, r"recorded with layers=2, not 3"),
        ({"model.moe.num_experts_per_tok": 1}, r"recorded with experts_per_token=\[2\], not \[1\]"),
    ],
)
def test_a_recording_of_another_model(recorded, changed, message):
    with pytest.raises(ValueError, match=rf"^--loads=.*{message}"):
        loads.read(str(recorded), replace(CONFIG, **changed), "--loads")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.json", '{"load": [[1, 2, 3]]}', r"has loads of 1 x 3 .*, the model 2 x 4; must be of"),
        ("e.json", '{"loss": 3}', "holds no load of experts"),
        ("metrics.jsonl", '{"step": 1, "loss": 3}\n', "holds no load of experts"),
        ("none.json", None, "no such file or folder"),
        ("folder/x", "", "no pass of recorded routing"),
    ],
)
def test_no_load(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    place = path.parent if name.startswith("folder") else path
    with pytest.raises(ValueError, match=rf"^--loads={place}: {message}"):
        loads.read(str(place), CONFIG, "--loads")

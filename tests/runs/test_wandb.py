"""Weights & Biases, offline: what is in its file, by its own messages; and without the package."""

import importlib.util
import json

import pytest

from dsmoe_jax.config import to_config_dict
from dsmoe_jax.runs import wandb_board
from tests.tools.forked import assert_refused, run_all, run_script
from tests.tools.tiny import tiny

LOGGED = """
import pathlib, sys
from dsmoe_jax.runs.metrics_log import MetricsLog
workdir = pathlib.Path(sys.argv[1])
for step in (0, 2):  # the second start goes on from step 2, and makes step 3 again
    log = MetricsLog(workdir, step, "moe")
    log.write({"step": step + 1, "loss": 6.0 - step, "maxvio": [0.5, 0.25]})
    log.write({"step": step + 2, "loss": 5.5 - step, "step_seconds": {"p50": 0.25}})
    log.close()
"""
READ = """
import json, pathlib, struct, sys
from wandb.proto import wandb_internal_pb2

def records(data):
    # A log of LevelDB: blocks of 32 KiB, records in parts (1 whole, 2 first, 3 middle, 4 last).
    place, whole = 7, b""  # after ":W&B" and its version
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""

for path in sorted(pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {i.key or i.nested_key[0]: i.value_json for i in record.run.config.update}
            print(json.dumps(["run", record.run.run_id, record.run.project, config]))
        if kind == "history":
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            print(json.dumps(["row", {k: v for k, v in items.items() if k[0] != "_"}]))
"""


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_config_dict(tiny()).to_dict()))
    for name, text in (("logged.py", LOGGED), ("read.py", READ)):
        (tmp_path / name).write_text(text)
    logged = run_script(tmp_path / "logged.py", str(workdir))
    assert logged.code == 0, logged.err
    read = run_script(tmp_path / "read.py", str(workdir))
    assert read.code == 0, read.err
    found = [json.loads(line) for line in read.out.splitlines()]
    identity = (workdir / "wandb/run_id.txt").read_text()
    runs = [entry for entry in found if entry[0] == "run"]
    assert {tuple(run[1:3]) for run in runs} == {(identity, "moe")}, "both starts are one run"
    assert json.loads(runs[0][3]["model"])["vocab_size"] == 512
    rows = [{k: json.loads(v) for k, v in entry[1].items()} for entry in found if entry[0] == "row"]
    assert rows == [
        {"step": 1, "loss": 6.0, "maxvio/layer_0": 0.5, "maxvio/layer_1": 0.25},
        {"step": 2, "loss": 5.5, "step_seconds/p50": 0.25},
        {"step": 3, "loss": 4.0, "maxvio/layer_0": 0.5, "maxvio/layer_1": 0.25},
        {"step": 4, "loss": 3.5, "step_seconds/p50": 0.25},
    ]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--wandb=moe: .* pip install 'dsmoe_jax\[wandb\]'"):
        wandb_board.check("moe", "runs/moe")


def test_the_command_takes_it(tmp_path):
    config = "--config=configs/dsmoe_2b.py:smoke"
    wrong, right = run_all(
        [
            ["train", config, f"--workdir={tmp_path}", flag]
            for flag in ("--wandbb=x", "--wandb=moe")
        ],
        only_parse=True,
    )
    assert_refused(wrong, "did you mean --wandb?")
    assert right.code == 0

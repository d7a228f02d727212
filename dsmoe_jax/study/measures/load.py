"""Measures of the load: how evenly the experts, and their devices, are used."""

from __future__ import annotations

import numpy as np

from dsmoe_jax.study import readings
from dsmoe_jax.study.measures.measure import LOAD, RESULTS, Measure

RUNNING = "maxvio_running"  # the key in metrics.jsonl: load of the last 100 steps or so

OF_LOAD: dict[str, Measure] = {
    "maxvio": Measure(
        "MaxVio on held-out text",
        readings.held_out("maxvio", np.mean),
        columns={RESULTS: "MaxVio"},
        digits=2,
        lower_is_better=True,
        spread=False,
        note="MaxVio: how far the load of the most loaded expert is above the mean, relative to"
        " it, on the held-out text; mean over layers.",
    ),
    "maxvio_highest": Measure(
        "highest MaxVio of a batch",
        readings.logged("maxvio", np.mean, np.max),
        columns={LOAD: "MaxVio of a batch: highest"},
        digits=1,
        lower_is_better=True,
    ),
    "maxvio_last_fifth": Measure(
        "MaxVio of a batch in the last fifth of the steps",
        readings.logged("maxvio", np.mean, readings.mean_of_last_fifth),
        columns={LOAD: "in the last fifth"},
        digits=2,
        lower_is_better=True,
    ),
    "maxvio_running": Measure(
        "MaxVio over the last 100 steps",
        readings.logged(RUNNING, np.mean, readings.last),
        columns={RESULTS: "in training", LOAD: "over the window, at the end"},
        digits=2,
        lower_is_better=True,
        note="In training: MaxVio of the load of the last 100 steps or so.",
    ),
    "maxvio_running_worst": Measure(
        "MaxVio over the last 100 steps in the worst layer",
        readings.logged(RUNNING, np.max, readings.last),
        columns={LOAD: "its worst layer"},
        digits=2,
        lower_is_better=True,
    ),
    "dead_experts": Measure(
        "dead experts on held-out text",
        readings.held_out("dead_experts", np.sum),
        columns={RESULTS: "dead experts"},
        digits=None,
        lower_is_better=True,
        spread=False,
        note="Dead experts: those of all layers without a token of the held-out text.",
    ),
    "dead_experts_highest": Measure(
        "most dead experts in a batch",
        readings.logged("dead_experts", np.sum, np.max),
        columns={LOAD: "dead experts in a batch: most"},
        digits=0,
        lower_is_better=True,
    ),
    "dead_experts_last": Measure(
        "dead experts in the last batch",
        readings.logged("dead_experts", np.sum, readings.last),
        columns={LOAD: "at the end"},
        digits=0,
        lower_is_better=True,
    ),
    "busiest_three": Measure(
        "share of the three busiest experts",
        readings.of_load(readings.busiest_percent),
        "%",
        digits=1,
        lower_is_better=True,
        note="Share of the three busiest experts: of all assignments on the held-out text; mean"
        " over layers.",
    ),
    "device_maxvio": Measure(
        "MaxVio of devices on held-out text",
        readings.of_load(readings.device_maxvio),
        digits=2,
        lower_is_better=True,
        note="MaxVio of devices: that of the assignments that devices get, not experts.",
    ),
    # A token once to each of the `expert_groups` devices that have experts of it, one way.
    "device_megabytes": Measure(
        "megabytes sent to devices in a step",
        readings.logged("device_megabytes", np.sum, readings.mean_of_last_fifth),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
        note="Megabytes sent to devices: the rows that all layers send to the devices of the"
        " experts, one way, a step; mean of the last fifth of the steps.",
    ),
    "traffic_maxvio": Measure(
        "MaxVio of the rows that devices receive",
        readings.logged("device_rows", readings.mean_maxvio, readings.mean_of_last_fifth),
        digits=2,
        lower_is_better=True,
        note="MaxVio of the rows that devices receive: a token comes once to each device that has"
        " experts of it, so that devices with equal load can differ; mean over layers and the last"
        " fifth of the logged batches.",
    ),
}

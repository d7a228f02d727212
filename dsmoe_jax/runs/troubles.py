"""Troubles of a run: sentences about what went wrong, from its rows and events.

Shapes: L MoE layers, E routed experts, H hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsmoe_jax.progress import duration
from dsmoe_jax.runs import events

Rows = list[dict[str, Any]]

RECENT = 20  # rows: what is of now
IDLE = 0.1  # share of the time without a step from which on it is said
STRAGGLES = 0.1  # of a step's time: what a host may take more than the others
SILENT = 10  # times the usual time between two rows, and at least a minute


def find(rows: Rows, log: Rows) -> list[str]:
    """Sentences, the gravest first.

    Args:
      rows: training rows of metrics.jsonl, in order.
      log: events, in order.
    """
    return [sentence for look in _LOOKS for sentence in look(rows, log)]


def silent(rows: Rows, seconds: float) -> list[str]:
    """Says so if a run that has a process has written nothing for too long.

    Args:
      rows: training rows.
      seconds: since it wrote something.
    """
    usual = _seconds_between(rows)
    if usual is None or seconds < max(60.0, SILENT * usual):
        return []
    return [f"silent for {duration(seconds)}, where a row came every {duration(usual)}: it hangs?"]


def _seconds_between(rows: Rows) -> float | None:
    """The time between the last two rows; None if it is not known."""
    if len(rows) < 2 or not rows[-1].get("tokens_per_second"):
        return None
    return (rows[-1]["tokens"] - rows[-2]["tokens"]) / rows[-1]["tokens_per_second"]


def _failures(rows: Rows, log: Rows) -> list[str]:
    del rows
    failed = [event for event in log if event["event"] == events.FAILED]
    if not failed:
        return []
    times = "" if len(failed) == 1 else f" ({len(failed)} times in all)"
    return [f"failed after step {failed[-1].get('step')}{times}: {failed[-1].get('error')}"]


def _restarts(rows: Rows, log: Rows) -> list[str]:
    """Counts the starts before which nothing was said: kills, and machines that went away."""
    del rows
    starts = (events.START, events.RESUME)
    said = (events.STOPPED, events.FAILED, events.END)
    at = [i for i, event in enumerate(log) if event["event"] in starts]
    killed = sum(log[i - 1]["event"] not in said for i in at if i)
    stopped = sum(event["event"] == events.STOPPED for event in log)
    found = [f"killed without a word {_times(killed)}, and started again"] if killed else []
    return found + ([f"stopped by a signal {_times(stopped)}"] if stopped else [])


def _spikes(rows: Rows, log: Rows) -> list[str]:
    del rows
    spikes = [event for event in log if event["event"] == events.SPIKE]
    # A run that was killed meets a spike again; one that went back meets another in that step.
    met = {str(e.get("action")): set[tuple[Any, Any]]() for e in spikes}
    for event in spikes:
        met[str(event.get("action"))].add((event.get("spike_step"), event.get("value")))
    if not met:
        return []
    counted = ", ".join(f"{len(found)} x {action}" for action, found in met.items())
    return [f"spikes: {counted}; the last in step {spikes[-1].get('spike_step')}"]


def _not_finite(rows: Rows, log: Rows) -> list[str]:
    del log
    bad = [row["step"] for row in rows if not np.isfinite([row["loss"], row["grad_norm"]]).all()]
    if not bad:
        return []
    return [f"loss or gradient not finite in {len(bad)} rows, last in step {bad[-1]}"]


def _drops(rows: Rows, log: Rows) -> list[str]:
    del log
    rows = [row for row in rows if "dropped" in row and "load" in row]
    dropped = sum(np.sum(row["dropped"]) for row in rows)
    if not dropped:
        return []
    share = dropped / sum(np.sum(row["load"]) for row in rows)
    last = np.sum(rows[-1]["dropped"]) / np.sum(rows[-1]["load"])
    return [f"dropped {share:.2%} of the assignments in the logged steps, {last:.2%} in the last"]


def _dead_experts(rows: Rows, log: Rows) -> list[str]:
    del log
    loads = [row["load"] for row in rows[-RECENT:] if "load" in row]
    if not loads or len({np.shape(load_LE) for load_LE in loads}) > 1:
        return []
    dead_L = (np.sum(loads, axis=0) == 0).sum(axis=1)
    layers = [f"{n} in MoE layer {i + 1}" for i, n in enumerate(dead_L) if n]
    many = f"; {len(layers) - 4} layers more" if len(layers) > 4 else ""
    if not layers:
        return []
    return [f"experts without a token in the last {len(loads)} rows: {', '.join(layers[:4])}{many}"]


def _idle(rows: Rows, log: Rows) -> list[str]:
    """The device waits for its host: data, writing, a slow file system."""
    del log
    shares = [row["overhead"] for row in rows[-RECENT:] if "overhead" in row]
    share = float(np.median(shares)) if shares else 0.0
    if share <= IDLE:
        return []
    return [f"the device has no step for {share:.0%} of the time: its host is late"]


def _stragglers(rows: Rows, log: Rows) -> list[str]:
    """Hosts that take more time for themselves than the others, by a tenth of a step."""
    rows = [row for row in rows[-RECENT:] if "host_data_seconds" in row and "step_seconds" in row]
    if not rows or len(rows[-1]["host_data_seconds"]) < 2:
        return []
    n_hosts = len(rows[-1]["host_data_seconds"])
    rows = [row for row in rows if len(row["host_data_seconds"]) == n_hosts]
    data_H = np.median([row["host_data_seconds"] for row in rows], axis=0)
    own_H = data_H + np.median([row["host_work_seconds"] for row in rows], axis=0)
    late = STRAGGLES * rows[-1]["step_seconds"]["p50"]
    names = next((event["hosts"] for event in reversed(log) if "hosts" in event), [])
    found = []
    for i, own in enumerate(own_H):
        others = float(np.median(np.delete(own_H, i)))
        if own - others > late:
            name = f" ({names[i]})" if i < len(names) else ""
            found.append(
                f"host {i}{name} takes {own:.3g} s a step for itself, of them {data_H[i]:.3g} s for"
                f" its data; the others take {others:.3g} s"
            )
    return found


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


_LOOKS: tuple[Callable[[Rows, Rows], list[str]], ...] = (
    _failures,
    _spikes,
    _not_finite,
    _restarts,
    _drops,
    _dead_experts,
    _idle,
    _stragglers,
)

"""The status of a run in words, for the terminal and for its page."""

from __future__ import annotations

from typing import Any

from dsmoe_jax.progress import duration
from dsmoe_jax.report.numbers import short
from dsmoe_jax.runs.status import Status

EVENTS = 5  # the last ones, on a terminal


def text(status: Status, now: float) -> str:
    """The status for a terminal: a line, and what there is to say, one line each."""
    lines = [": ".join(part for part in (status.workdir, headline(status)) if part)]
    lines += [f"  {name:<11} {value}" for name, value in facts(status, now).items()]
    lines += [f"  {'went wrong' if i == 0 else '':<11} {t}" for i, t in enumerate(status.troubles)]
    for i, event in enumerate(status.events[-EVENTS:]):
        lines.append(f"  {'events' if i == 0 else '':<11} {event_line(event, now)}")
    return "\n".join(lines)


def event_line(event: dict[str, Any], now: float) -> str:
    """One event: how long ago, its name, its step, its details."""
    step = "" if event.get("step") is None else f" at step {event['step']:,}"
    shown = details(event)
    ago = f"{duration(max(now - event['time'], 0))} ago"
    return f"{ago}: {event['event']}{step}" + (f" ({shown})" if shown else "")


def details(event: dict[str, Any]) -> str:
    """The details of an event, by name."""
    found = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
    return ", ".join(f"{key.replace('_', ' ')} {_detail(value)}" for key, value in found.items())


def headline(status: Status) -> str:
    """The state, how far the run is, how long it will still take, and what is to be said of it."""
    parts = [status.state + (f" {status.says}" if status.is_running else "")]
    if status.step is not None and status.steps:
        parts.append(f"step {status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})")
    if status.seconds_left is not None:
        left = duration(status.seconds_left)
        parts.append(f"{left} to go" if status.is_running else f"{left} of training left")
    if status.says and not status.is_running:
        parts.append(status.says)
    return "; ".join(parts)


def facts(status: Status, now: float) -> dict[str, str]:
    """The facts of a run, by name; `now` is in seconds since 1970."""
    found: dict[str, str] = {}
    if status.name is not None:
        sizes = f"{short(status.parameters)} parameters, {short(status.activated)} activated"
        found["model"] = f"{status.name}, {sizes}"
    if status.tokens:
        found["tokens"] = f"{short(status.tokens)} of {short(status.all_tokens)}"
    losses = [f"{status.loss:.4f} in training"] if status.loss is not None else []
    if status.validation_loss is not None:
        losses.append(f"{status.validation_loss:.4f} on held-out text")
    if losses:
        found["loss"] = ", ".join(losses)
    if status.tokens_per_second is not None:
        speed = [f"{status.tokens_per_second:,.0f} tokens/s"]
        if status.flops_utilization is not None:
            speed.append(f"MFU {status.flops_utilization:.1%}")
        if status.step_seconds is not None:
            shown = (f"{name} {value:.3g} s" for name, value in status.step_seconds.items())
            speed.append(f"a step {', '.join(shown)}")
        found["speed"] = "; ".join(speed)
    if status.checkpoints:
        last = status.checkpoints[-1]
        others = ", ".join(f"{c.step:,}" for c in status.checkpoints[-4:-1])
        found["checkpoint"] = (
            f"step {last.step:,}, {duration(max(now - last.time, 0))} ago,"
            f" {last.bytes / 1e6:,.1f} MB" + (f" (and {others})" if others else "")
        )
    if status.last_change is not None:
        found["written"] = f"{duration(max(now - status.last_change, 0))} ago"
    return found


def _detail(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        names = list(dict.fromkeys(map(str, value)))
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return str(value)

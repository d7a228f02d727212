"""The page of a run on its way: one HTML file that a browser loads anew by itself.

It needs no network and no server, and is written whole: a browser sees the old page or the new one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.report import live_plots
from dsmoe_jax.report.blocks import Block, Facts, Heading, Pictures, Table, Text
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.status_text import details, facts, headline
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.metrics_log import joined
from dsmoe_jax.runs.status import Status, of_run

PAGE = "report.html"
EVENTS = 30  # the newest ones
CHECKPOINTS = 10


def write(directory: Path, config: Config, rows: list[dict[str, Any]], seconds: float) -> None:
    """Writes the page of a run.

    Args:
      directory: its workdir.
      config: of the run.
      rows: of metrics.jsonl, in order.
      seconds: after which a browser loads the page again, while the run has a process.

    Raises:
      OSError: naming the file, if the disk is full.
    """
    status = of_run(directory, config, rows, [])
    refresh = max(1, round(seconds)) if status.is_running else None
    page = to_html(status.name or config.name, blocks(status, joined(rows), time.time()), refresh)
    json_files.write_text(directory / PAGE, page)


def blocks(status: Status, rows: list[dict[str, Any]], now: float) -> list[Block]:
    """The blocks of the page.

    Args:
      status: of the run.
      rows: of metrics.jsonl, one a step.
      now: seconds since 1970.
    """
    found: list[Block] = [Text(literal(status.workdir), "source")]
    found.append(Text(literal(headline(status)), "finding"))
    found.append(Facts({name: literal(value) for name, value in facts(status, now).items()}))
    found.append(Heading("What went wrong"))
    found += [Text(literal(trouble)) for trouble in status.troubles]
    if not status.troubles:
        found.append(Text("Nothing that the log knows of."))
    if pictures := live_plots.draw(rows):
        found += [Heading("How it goes"), Pictures(pictures)]
    found += _checkpoints(status)
    if status.events:
        newest = [_event_row(event) for event in reversed(status.events[-EVENTS:])]
        head = ("when", "event", "step", "")
        found += [Heading("What happened"), Table(head, newest, prose=True)]
    found.append(Text(_age(status, now), "note"))
    return found


def _checkpoints(status: Status) -> list[Block]:
    if not status.checkpoints:
        return []
    newest = [
        [f"{c.step:,}", _clock(c.time), f"{c.bytes / 1e6:,.1f}"]
        for c in reversed(status.checkpoints[-CHECKPOINTS:])
    ]
    return [Heading("Checkpoints"), Table(("step", "written", "MB"), newest)]


def _event_row(event: dict[str, Any]) -> list[str]:
    step = event.get("step")
    shown = "" if step is None else f"{step:,}"
    return [_clock(event["time"]), event["event"], shown, details(event)]


def _age(status: Status, now: float) -> str:
    said = f"Written on {_clock(now)}, in the time of the run's first host."
    if not status.is_running:
        return said
    return (
        f"{said} The page loads itself anew; one that stays as it is comes of a run that is gone."
    )


def _clock(seconds: float) -> str:
    return time.strftime("%d %b %H:%M:%S", time.localtime(seconds))

"""The page of a run on its way: what it says, that it needs nothing else, when it is written."""

import html.parser
import json
import re
import threading
import time

import pytest

from dsmoe_jax.report import live_page, live_plots
from dsmoe_jax.report.live import LiveReport
from dsmoe_jax.runs import events
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.status import of_run
from dsmoe_jax.runs.workdir import claim
from dsmoe_jax.training.loop import NonFinite, train
from tests.tools.tiny import tiny


def row(step, **more):
    """A row of two layers of four experts."""
    return {
        "step": step, "tokens": 256 * step, "loss": 6.0 - step / 1000, "grad_norm": 1.0,
        "learning_rate": 0.01, "tokens_per_second": 500.0, "flops_utilization": 0.4,
        "overhead": 0.0, "load": [[64] * 4, [96, 32, 64, 64]], "maxvio_running": [0.0, 0.5],
        "dropped": [0, 0], "step_seconds": {"p50": 0.5, "p95": 0.6, "p99": 0.7},
        "host_data_seconds": [0.01, 0.2], "host_work_seconds": [0.02, 0.02], **more,
    }  # fmt: skip


class _Elements(html.parser.HTMLParser):
    """Names of the elements that are open; every one must be closed."""

    EMPTY = ("meta", "img", "image", "br", "use")

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def page_of(workdir, config, rows):
    live_page.write(workdir, config, rows, 30)
    return (workdir / live_page.PAGE).read_text()


def test_a_running_run(tmp_path):
    config = tiny(**{"data.corpus": None})
    with claim(tmp_path, config):
        journal = Journal(tmp_path)
        journal.step = 7
        journal.add(events.START, hosts=["alpha", "beta"])
        journal.add(events.SPIKE, action="skip", spike_step=7)
        journal.add("retry", of="a <bucket>")  # an event that this version does not know
        rows = [row(step) for step in range(1, 8)] + [{"step": 7, "validation_loss": 5.5}]
        rows[6]["dropped"] = [16, 0]
        page = page_of(tmp_path, config, rows)
    parser = _Elements()
    parser.feed(page)
    assert parser.open == []
    links = [value for name, value in parser.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:")) for value in links), "it opens without a network"
    assert "<script" not in page
    assert '<meta http-equiv="refresh" content="30" />' in page
    said = re.sub(r"<[^>]+>", " ", page)
    for text in (
        "running by process", "step 7 of 10 (70%)", "2 s to go", "500 tokens/s", "MFU 40.0%",
        "5.5000 on held-out text", "spikes: 1 x skip", "dropped 0.45% of", "hosts alpha, beta",
        "of a &lt;bucket&gt;", "host 1 (beta) takes 0.22 s a step", "p95 0.6 s",
    ):  # fmt: skip
        assert text in said, text
    for picture in live_plots.PICTURES.values():
        assert f"<h3>{picture.title}</h3>" in page
    assert said.index("retry") < said.index("hosts alpha"), "the newest first"


def test_an_ended_run_is_not_loaded_again(tmp_path):
    with claim(tmp_path, tiny(**{"data.corpus": None})):
        pass
    page = page_of(tmp_path, tiny(), [row(1)])
    assert "http-equiv" not in page
    assert "Dropped</h3>" not in page, "there is nothing to draw"
    assert ">dead; step 1 of 10" in page


def test_pictures_of_long_runs_and_odd_numbers():
    """Rows taken together, of a dense model, not finite, with layers that come and go."""
    nan = float("nan")
    rows = [row(step, loss=nan if step == 5 else 6.0) for step in range(1, 1001)]
    rows[500]["grad_norm"] = 70.0
    rows[600]["grad_norm"] = nan
    for later in rows[700:]:
        later.update(maxvio_running=[0.5], load=[[1, 2]], dropped=[1])
    pictures = {picture.name: picture.figure for picture in live_plots.draw(rows)}
    assert list(pictures) == list(live_plots.PICTURES)
    x = pictures["speed"].axes[0].lines[0].get_xdata()
    assert len(x) == live_plots.STRETCHES
    (band,) = pictures["gradient"].axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].max() == 70.0, "the spike is in the band"
    dense = [{"step": 1, "tokens": 1, "loss": nan, "grad_norm": nan, "learning_rate": 0.1}]
    assert [picture.name for picture in live_plots.draw(dense)] == ["gradient"]
    assert live_plots.draw([]) == []


def test_when_it_is_written(tmp_path, monkeypatch):
    """The first row, then not before its time, and at the end; a full disk ends no run."""
    written, drawn = [], threading.Event()

    def write(directory, config, rows, seconds):
        written.append(len(rows))
        drawn.set()
        if len(written) == 2:
            raise OSError("report.html: cannot be written: no room")

    monkeypatch.setattr(live_page, "write", write)
    report, rows = LiveReport(1000.0), []
    for step in range(1, 4):
        rows.append(row(step))
        report.look(tmp_path, tiny(), rows)
        assert drawn.wait(20)
    report.close()
    assert written == [1, 3]


def test_it_takes_its_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(live_page, "write", lambda *_: time.sleep(0.02))
    report = LiveReport(0.001)
    report.look(tmp_path, tiny(), [row(1)])
    report.close()
    assert report._next - time.monotonic() > 0.9, "20 ms are a fiftieth of a second"


def test_a_run_writes_it(tiny_config, tmp_path, monkeypatch):
    """It fails in step 3; then it goes on to its end.  The page says both."""
    from dsmoe_jax.training import trainer

    config = tiny_config(
        **{"train.steps": 4, "train.eval_every": None, "train.checkpoint_every": 2}
    )
    bad = iter([None, None, ("loss", float("nan"))])
    monkeypatch.setattr(trainer, "first_non_finite", lambda _: next(bad))
    with pytest.raises(NonFinite):
        train(config, tmp_path, progress=False, watch=LiveReport(1000.0))
    monkeypatch.undo()
    page = (tmp_path / live_page.PAGE).read_text()
    assert ">failed; step 2 of 4" in page
    assert "step 3: loss=nan; stopped." in page
    train(config, tmp_path, progress=False, watch=LiveReport(1000.0))
    page = (tmp_path / live_page.PAGE).read_text()
    assert ">finished; step 4 of 4" in page
    assert f"{read_rows(tmp_path)[-1]['validation_loss']:.4f} on held-out text" in page
    assert not list(tmp_path.glob(".report*")), "written whole"
    status = of_run(tmp_path, config, read_rows(tmp_path), [])
    json.dumps([event["event"] for event in status.events])
    assert [event["event"] for event in status.events][-1] == events.END

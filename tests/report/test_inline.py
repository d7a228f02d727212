"""Pictures and pages inside notebooks: what a notebook is given to show."""

import base64
import html
import struct

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.planning.planner import Plan
from dsmoe_jax.planning.roofline import Roofline
from dsmoe_jax.report import exchange_plots, expert_plots, plan_plots
from dsmoe_jax.report.expert_plots import CHOSEN, IDLE, SHARED, ExpertsOfToken
from dsmoe_jax.report.inline import PIXELS_PER_INCH, Drawn, Page


def test_a_figure_is_an_image_with_twice_the_pixels_that_it_takes_on_the_screen():
    data, how = Drawn(Figure(figsize=(2, 1)))._repr_mimebundle_(include=None, exclude=None)
    image = base64.b64decode(data["image/png"])
    width, height = struct.unpack(">II", image[16:24])
    assert (width, height) == (4 * PIXELS_PER_INCH, 2 * PIXELS_PER_INCH)
    assert how == {"image/png": {"width": 2 * PIXELS_PER_INCH}}


def test_a_page_is_in_a_frame_as_it_was():
    text = "<p title=\"a\">'b' & <script>if (1 < 2) {}</script></p>"
    shown = Page(text, height=70)._repr_html_()
    inside = shown.split('srcdoc="')[1].split('"')[0]
    assert html.unescape(inside) == text
    assert "height:70px" in shown
    assert text not in repr(Page(text))


def test_experts_of_a_token_have_the_colours_of_what_they_are():
    models = {
        "a": ExpertsOfToken(MoEConfig(6, 2, 2, 4), (0, 5)),
        "b": ExpertsOfToken(MoEConfig(4, 0, 1, 8), (3,)),
    }
    first, second = expert_plots.of_a_token(models).axes
    assert [ax.get_title(loc="left") for ax in (first, second)] == ["a", "b"]
    inks = [SHARED, SHARED, CHOSEN, IDLE, IDLE, IDLE, IDLE, CHOSEN]
    assert [hex_of(block) for block in first.patches] == inks
    assert [hex_of(block) for block in second.patches] == [IDLE, IDLE, IDLE, CHOSEN]
    assert first.get_xlim() == (0, 8)  # equally long rows: these experts are half as wide
    assert second.get_xlim() == (0, 4)


def hex_of(block):
    red, green, blue, _ = (round(255 * part) for part in block.get_facecolor())
    return f"#{red:02x}{green:02x}{blue:02x}"


def test_rows_sent_stand_in_their_cells_with_their_sums():
    sent_PP = np.array([[3, 0], [12, 4]])
    (ax,) = exchange_plots.rows_sent(sent_PP).axes
    where = {tuple(np.round(text.get_position(), 1)): text.get_text() for text in ax.texts}
    cells = {(0, 0): "3", (1, 0): "0", (0, 1): "12", (1, 1): "4"}  # across, down
    sums = {(1.7, 0): "3", (1.7, 1): "16", (0, 1.8): "15", (1, 1.8): "4", (1.7, 1.8): "19"}
    assert where == cells | sums
    white = [text.get_text() for text in ax.texts if text.get_color() == "white"]
    assert white == ["12"]


def test_bars_of_memory_follow_each_other():
    plans = {
        "one": Plan({}, 1, {"parameters": 1.0, "moments": 2.0}, {}, {}),
        "two": Plan({}, 1, {"parameters": 4.0, "activations kept": 8.0}, {}, {}),
    }
    figure = plan_plots.memory(plans, hbm_gb=20.0, usable=0.9)
    (ax,) = figure.axes
    bars = [[(bar.get_x(), bar.get_width()) for bar in group] for group in ax.containers]
    assert bars == [[(0, 1), (0, 4)], [(1, 2), (4, 0)], [(3, 0), (4, 8)]]
    assert [np.asarray(line.get_xdata())[0] for line in ax.lines] == [18, 20]
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "parameters", "moments", "activations kept",
    ]  # fmt: skip
    assert [name.get_text() for name in ax.get_yticklabels()] == ["one", "two"]


def test_bars_of_time_stand_beside_each_other():
    bounds = {"one": Roofline(3.0, 2.0, 1.0, 2.0), "two": Roofline(6.0, 5.0, 4.0, 3.0)}
    (ax,) = plan_plots.times(bounds).axes
    seconds = [[bar.get_width() for bar in group] for group in ax.containers]
    assert seconds == [[3, 6], [2, 5], [1, 4]]
    names = [group.get_label() for group in ax.containers]
    assert names == ["compute", "HBM", "network"]
    middles = [[bar.get_y() + bar.get_height() / 2 for bar in group] for group in ax.containers]
    np.testing.assert_allclose(np.mean(middles, axis=0), [0, 1])

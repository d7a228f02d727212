"""The routing explorer in a real browser: what a person does, and what the page then shows.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts.
"""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from dsmoe_jax.analysis.routed_text import RoutedText
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.report import explorer
from tests.tools.patience import PATIENCE

N_EXPERTS = 5
HOSTILE = "</script><b>&"  # the name of a domain
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
# Does what a person does; the page is read back from its DOM.
PERSON = """
<script>
const seen = {};
const spans = () => [...document.querySelectorAll("#text span")];
const hues = () => spans().map((s) => s.style.getPropertyValue("--h"));
const slider = document.querySelector("#layer");
seen.text = document.querySelector("#text").textContent;
seen.first = hues();
slider.value = 2;
slider.dispatchEvent(new Event("input", { bubbles: true }));
seen.name = document.querySelector("#layer-name").textContent;
seen.second = hues();
seen.hidden = document.querySelector("#tip").hidden;
const move = { bubbles: true, clientX: 30, clientY: 90 };
spans()[3].dispatchEvent(new PointerEvent("pointermove", move));
const button = () => document.querySelector('#experts button[data-expert="1"]');
const tip = document.querySelector("#tip");
seen.tip = tip.textContent;
const place = tip.getBoundingClientRect();
seen.tip_inside = place.left >= 0 && place.right <= innerWidth;
button().click();
seen.picked = spans().map((s) => s.classList.contains("of"));
seen.pressed = button().getAttribute("aria-pressed");
seen.panel = document.querySelector("#expert").textContent;
seen.uses = document.querySelectorAll("#expert .use").length;
button().click();
seen.unpicked = document.querySelector("#expert").textContent;
spans()[3].click();
seen.clicked = document.querySelector("#expert h3").textContent;
seen.wide = document.documentElement.scrollWidth > innerWidth;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(3)
    n_tokens, shape = 60, (2, 60, 2)
    ids_LTK = np.argsort(rng.random((*shape[:2], N_EXPERTS)), axis=2)[..., :2].astype(np.int32)
    gates_LTK = rng.random(shape).astype(np.float32)
    ids_LTK[1, 5, :] = N_EXPERTS  # a token without an expert
    gates_LTK[1, 5, :] = 0
    ids_LTK[ids_LTK == 4] = N_EXPERTS  # an expert without a token
    return RoutedText(
        rng.integers(0, 300, n_tokens).astype(np.int32),
        np.repeat([0, 1], 30),
        np.tile(np.arange(30), 2),
        np.repeat([0, 1], 30),
        ids_LTK,
        np.where(ids_LTK == N_EXPERTS, 0, gates_LTK),
        N_EXPERTS,
        ["first", HOSTILE],
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus):
    return load_corpus(tiny_corpus).tokenizer


def test_the_page_loads_nothing_and_keeps_hostile_text_as_text(text, tokenizer):
    page = explorer.to_html("<i>title</i> & %%DATA%%", {"run": text}, tokenizer)
    assert page.count("&lt;i&gt;title&lt;/i&gt; &amp; %%DATA%%") == 2
    assert HOSTILE not in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["domains"] == ["first", HOSTILE]


def _see(page, tmp_path, width, person=PERSON):
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", person + "</body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --dump-dom"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-background-networking", "--disable-component-update",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", path.as_uri()],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(html.unescape(found[1]))


# Does the same with a second run beside the first, which has one layer less.
TWO = """
<script>
const seen = {};
const panes = [...document.querySelectorAll(".text")];
const hues = (pane) => [...pane.children].map((s) => s.style.getPropertyValue("--h"));
seen.names = [...document.querySelectorAll("#texts h2")].map((h) => h.textContent);
seen.same_text = panes[0].textContent === panes[1].textContent;
const slider = document.querySelector("#layer");
slider.value = 2;
slider.dispatchEvent(new Event("input", { bubbles: true }));
seen.hues = panes.map(hues);
const move = { bubbles: true, clientX: 9, clientY: 9 };
panes[1].children[3].dispatchEvent(new PointerEvent("pointermove", move));
seen.tip = document.querySelector("#tip").textContent;
panes[1].children[3].click();
seen.of = document.querySelector("#experts-of").textContent;
seen.picked = panes.map((pane) => pane.classList.contains("picked"));
seen.expert = document.querySelector("#expert h3").textContent;
seen.wide = document.documentElement.scrollWidth > innerWidth;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])
def test_two_runs_on_the_same_text(text, tokenizer, tmp_path, width):
    ids_LTK, gates_LTK = text.ids_LTK[:1, ::-1], text.gates_LTK[:1, ::-1]
    other = dataclasses.replace(text, ids_LTK=ids_LTK, gates_LTK=gates_LTK)
    page = explorer.to_html("Both", {"first": text, "second": other}, tokenizer)
    seen = _see(page, tmp_path, width, TWO)
    assert seen["names"] == ["first", "second"]
    assert seen["same_text"]
    assert seen["hues"] == [_hues(text, 1), _hues(other, 0)]
    best = _best(other)[0][3]
    assert f"expert {best}{gates_LTK[0, 3].max():.3f}" in seen["tip"]
    assert seen["of"] == "Experts of second"
    assert seen["picked"] == [False, True]
    assert seen["expert"].startswith(f"Expert {best}, layer 1")
    assert not seen["wide"]


@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])  # it makes no window narrower than that
def test_in_a_browser(text, tokenizer, tmp_path, width):
    seen = _see(explorer.to_html("Routing", {"run": text}, tokenizer), tmp_path, width)
    first = range(30)  # tokens of the first passage
    best_LT = _best(text)
    assert seen["text"] == "".join(tokenizer.pieces(text.token_ids_T[:30]))
    assert seen["first"] == _hues(text, 0)
    assert seen["name"] == "2 of 2"
    assert seen["second"] == _hues(text, 1)
    assert seen["second"][5] == ""
    assert seen["hidden"] is True
    gate = text.gates_LTK[1, 3].max()
    assert f"expert {best_LT[1][3]}{gate:.3f}" in seen["tip"]
    assert "at position 3" in seen["tip"]
    assert seen["tip_inside"]
    assert seen["picked"] == [1 in text.ids_LTK[1, t] for t in first]
    assert seen["pressed"] == "true"
    assert "Expert 1, layer 2" in seen["panel"]
    assert HOSTILE in seen["panel"]
    assert 1 <= seen["uses"] <= explorer.USES
    assert seen["unpicked"] == ""
    assert seen["clicked"].startswith(f"Expert {best_LT[1][3]}, layer 2")
    assert not seen["wide"]


def _hues(text, layer):
    """Colours of the first passage."""
    ids = _best(text)[layer][:30]
    return ["" if e is None else f"{e * 137.508 % 360:.1f}" for e in ids]


def _best(text):
    """The expert with the largest gate of each token by layer; None without one."""
    best_LT = []
    for ids_TK, gates_TK in zip(text.ids_LTK, text.gates_LTK, strict=True):
        best_T = ids_TK[np.arange(len(ids_TK)), gates_TK.argmax(axis=1)]
        real_T = (ids_TK < N_EXPERTS).any(axis=1)
        best_LT.append([int(e) if real else None for e, real in zip(best_T, real_T, strict=True)])
    return best_LT

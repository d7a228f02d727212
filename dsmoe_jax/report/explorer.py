"""The routing explorer: one HTML page with a text coloured by expert, which loads nothing.

A slider picks the layer, a token under the pointer shows its experts and gates, and a click on an
expert shows what it serves.  The page is `explorer.html` with the style, the script and the data
put in; the script only draws, every number is computed here.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, G domains.
"""

from __future__ import annotations

import html
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsmoe_jax.analysis import specialisation
from dsmoe_jax.analysis.routed_text import RoutedText
from dsmoe_jax.analysis.tables import FAVOURITES, MIN_COUNT
from dsmoe_jax.data.tokenizer import Tokenizer

PASSAGE = 320  # tokens of a passage on the page
PASSAGES = 2  # of each domain
USES = 6  # tokens in context for each expert
CONTEXT = 10  # tokens before and after each of them
GATE_DIGITS = 3
CUT = "\ufffd"  # a character of which the text has only a part

_FOLDER = pathlib.Path(__file__).parent


def to_html(title: str, texts: Mapping[str, RoutedText], tokenizer: Tokenizer) -> str:
    """The page of a routed text.

    Args:
      title: heading of the page.
      texts: the same text, of at least one token, as each run routes it, by name; more than one
        are shown side by side.
      tokenizer: of the text.
    """
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _part("explorer.css"),
        "SCRIPT": _part("explorer.js"),
        "DATA": _in_script(explorer_data(texts, tokenizer)),
    }
    # In one pass: what is put in may hold such a name itself.
    return re.sub(r"%%([A-Z]+)%%", lambda name: parts[name[1]], _part("explorer.html"))


def explorer_data(texts: Mapping[str, RoutedText], tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the page shows, as JSON.

    Returns:
      `tokens` (T) and `domains` of the text; `passages` with their tokens; and for each of `runs`
      its `name`, `experts` (E), `layers` (L), `routing` of each passage, ids and gates by layer;
      `load` (L, E), relative to an even load; `load_by_domain` (L, E, G), relative to an even load
      of the domain; `favourites` and `uses` by layer and expert.
    """
    text = next(iter(texts.values()))
    places = _places(text)
    return {
        "tokens": text.n_tokens,
        "domains": list(text.domains),
        "passages": [
            {
                "name": name,
                "tokens": tokenizer.pieces(text.token_ids_T[of_passage].tolist()),
                "positions": text.position_T[of_passage].tolist(),
            }
            for name, of_passage in places.items()
        ],
        "min_count": MIN_COUNT,
        "runs": [_run(name, routed, tokenizer, places) for name, routed in texts.items()],
    }


def _places(text: RoutedText) -> dict[str, np.ndarray]:
    """The first tokens of each domain, cut into passages; its sequences follow each other."""
    found = {}
    for g, name in enumerate(text.domains):
        places_T = np.flatnonzero(text.domain_T == g)[: PASSAGE * PASSAGES]
        for number, start in enumerate(range(0, len(places_T), PASSAGE), start=1):
            found[f"{name} {number}"] = places_T[start : start + PASSAGE]
    return found


def _run(
    name: str, text: RoutedText, tokenizer: Tokenizer, places: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Routing of the text by a run."""
    n_domains = len(text.domains)
    load_GLE = specialisation.load_by_group(text.ids_LTK, text.domain_T, n_domains, text.n_experts)
    relative_GLE = specialisation.shares(load_GLE) * text.n_experts
    relative_LE = specialisation.shares(load_GLE.sum(axis=0)) * text.n_experts
    return {
        "name": name,
        "experts": text.n_experts,
        "layers": text.n_layers,
        "routing": [_routing(text, of_passage) for of_passage in places.values()],
        "load": np.round(relative_LE, 2).tolist(),
        "load_by_domain": np.round(relative_GLE.transpose(1, 2, 0), 2).tolist(),
        "favourites": _favourites(text, tokenizer),
        "uses": _uses(text, tokenizer),
    }


def _routing(text: RoutedText, places: np.ndarray) -> dict[str, Any]:
    return {
        "ids": text.ids_LTK[:, places].tolist(),
        "gates": np.round(text.gates_LTK[:, places].astype(float), GATE_DIGITS).tolist(),
    }


def _favourites(text: RoutedText, tokenizer: Tokenizer) -> list[Any]:
    table = specialisation.by_vocabulary(text.ids_LTK, text.token_ids_T, text.n_experts, MIN_COUNT)
    return [
        [
            [[tokenizer.token(token), round(share, 2)] for token, share in favourites]
            for favourites in specialisation.favourite_tokens(table, layer, FAVOURITES)
        ]
        for layer in range(text.n_layers)
    ]


def _uses(text: RoutedText, tokenizer: Tokenizer) -> list[Any]:
    """The strongest uses of each expert: text before, token, text after, gate, domain."""
    by_layer = []
    for layer in range(text.n_layers):
        by_expert = []
        for expert in range(text.n_experts):
            uses = text.uses(layer, expert, USES, apart=CONTEXT)
            by_expert.append([_in_context(text, tokenizer, use) for use in uses])
        by_layer.append(by_expert)
    return by_layer


def _in_context(text: RoutedText, tokenizer: Tokenizer, use: specialisation.Use) -> list[Any]:
    before, after = tokenizer.decode_batch(list(text.around(use.place, CONTEXT)))
    return [
        before.strip(CUT),
        tokenizer.token(int(text.token_ids_T[use.place])),
        after.strip(CUT),
        round(use.gate, GATE_DIGITS),
        int(text.domain_T[use.place]),
    ]


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _in_script(data: dict[str, Any]) -> str:
    """JSON for a <script> element, which `</script>` or `<!--` in a text would end or change."""
    dumped = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return dumped.replace("<", "\\u003c")

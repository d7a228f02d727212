"""Every line of config in docs/routers_and_losses.md builds a model."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import configs
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.model import build
from dsmoe_jax.moe import dropping, losses
from dsmoe_jax.moe.routers import ROUTERS

PAGE = (Path(__file__).parents[2] / "docs/routers_and_losses.md").read_text()
SIZES = {"D": 9, "M": 3}  # devices of the smoke scale's 63 experts, and how many a token may use


def documented():
    """(name, its lines, its optional lines in parentheses) of every row with lines of config."""
    rows, column = [], None
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "lines" in cells:
            column = cells.index("lines")
        elif not cells:
            column = None
        elif column is not None and "`" in cells[column]:
            needed, *optional = cells[column].split(", (")
            if "as above" in needed:
                needed = f"{rows[-1][1]}, {needed}"
            rows.append((cells[0], needed, "".join(optional)))
    return rows


def overrides(text):
    """`KEY=VALUE` between backticks as dotted keys and values; keys are in `model.moe`."""
    found = {}
    for key, value in re.findall(r"`([\w.-]+)=([^`]+)`", text):
        if key.startswith("--config."):
            found[key.removeprefix("--config.")] = value
        else:
            found[f"model.moe.{key}"] = SIZES.get(value) or ast.literal_eval(value)
    return found


@pytest.mark.parametrize(("name", "needed", "optional"), documented())
def test_lines_build_a_model(name, needed, optional):
    smoke = from_config_dict(configs.load("dsmoe_2b", "smoke"))
    for more in (None, *overrides(optional).items()):
        changes = overrides(needed) | dict([more] if more else [])
        assert changes, name
        config = replace(smoke, **changes)
        build.model_shapes(config.model)
        dropping.check_capacity(config.model.moe, config.tokens_per_step)


def test_nothing_is_left_out():
    rows = documented()
    needed = dict(itertools.chain(*(overrides(needed).items() for _, needed, _ in rows)))
    routers = {overrides(needed).get("model.moe.router.name") for _, needed, _ in rows}
    assert routers - {None} == set(ROUTERS) - {"topk"}, "that one is the default"
    assert {f"model.moe.balance.{name}.factor" for name in losses.TERMS} <= needed.keys()
    policies = {overrides(needed).get("model.moe.drop.policy") for _, needed, _ in rows}
    assert policies - {None} == set(dropping.POLICIES) - {"position"}, "that one is the default"
    options = dict(itertools.chain(*(overrides(optional).items() for _, _, optional in rows)))
    every = {f"router.options.{option}" for r in ROUTERS.values() for option in r.options}
    assert {f"model.moe.{key}" for key in every - {"router.options.seed"}} <= options.keys()

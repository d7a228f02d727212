"""Registries say everything: their names are compared with strings in no other file.

What depends on which router, term, policy, dispatcher, backend, kernel or attention a config names
is a field of its line.  So a new one is a line in one place.
"""

import ast
from pathlib import Path

import pytest

import dsmoe_jax
from dsmoe_jax import surgery
from dsmoe_jax.data import row_kinds
from dsmoe_jax.evaluation import downstream, question_sets
from dsmoe_jax.moe import dispatch, dropping, experts, kernels, losses, routers
from dsmoe_jax.moe.routers import scores
from dsmoe_jax.nn import attention, feed_forward
from dsmoe_jax.runs import loads
from dsmoe_jax.surgery import likeness
from dsmoe_jax.training import freezing, spikes

PACKAGE = Path(dsmoe_jax.__file__).parent
REGISTRIES = {
    routers: routers.ROUTERS,
    scores: scores.SCORING,
    feed_forward: feed_forward.FORMS,
    losses: losses.TERMS,
    dropping: dropping.POLICIES,
    dispatch: dispatch.DISPATCHERS,
    experts: experts.BACKENDS,
    kernels: kernels.ROW_KERNELS,
    attention: attention.ATTENTION,
    attention.kernels: attention.kernels.KERNELS,
    attention.latent: attention.latent.FORMS,
    freezing: freezing.PARTS,
    row_kinds: row_kinds.ROW_KINDS,
    surgery: surgery.OPERATIONS,
    likeness: likeness.LIKENESS,
    loads: loads.KINDS,
    question_sets: question_sets.QUESTION_SETS,
    downstream: downstream.READINGS,
    spikes: spikes.ACTIONS,
}


def names_known_in(source, names):
    """(line, name) of every name that is compared with, matched, or looked up in a registry."""
    tables = {
        *("ROUTERS", "TERMS", "POLICIES", "DISPATCHERS", "BACKENDS", "ROW_KERNELS", "ATTENTION"),
        *("KERNELS", "FORMS", "SCORING", "PARTS", "ROW_KINDS", "OPERATIONS", "LIKENESS", "KINDS"),
        *("QUESTION_SETS", "READINGS", "ACTIONS"),
    }
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare():
                places = [node.left, *node.comparators]
            case ast.MatchValue():
                places = [node.value]
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
                places = node.args
            case ast.Call(func=ast.Attribute(value=ast.Name(id) | ast.Attribute(attr=id))):
                places = node.args if id in tables else []
            case ast.Subscript(value=ast.Name(id) | ast.Attribute(attr=id)):
                places = [node.slice] if id in tables else []
            case _:
                continue
        for place in places:
            inside = place.elts if isinstance(place, ast.Tuple | ast.List | ast.Set) else [place]
            for item in inside:
                if isinstance(item, ast.Constant) and item.value in names:
                    yield item.lineno, item.value


def test_no_name_is_known_outside_its_registry():
    every = {name for table in REGISTRIES.values() for name in table}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = [table for module, table in REGISTRIES.items() if Path(module.__file__) == path]
        names = every - {name for table in own for name in table}
        known = names_known_in(path.read_text(), names)
        found += [f"{path.relative_to(PACKAGE)}:{line}: {name!r}" for line, name in known]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'moe.router.name == "hash"',
        '"hash" != name',
        'name in ("topk", "hash")',
        'name not in {"hash"}',
        'ROUTERS["hash"]',
        'routers.ROUTERS["hash"].route',
        'ROUTERS.get("hash")',
        'name.startswith("hash")',
        'match name:\n    case "topk" | "hash": pass',
    ],
)
def test_the_search_finds_a_name(line):
    assert "hash" in {name for _, name in names_known_in(line, {"hash"})}


@pytest.mark.parametrize(
    "line", ['print("hash")', 'x["hash"]', 'name == "hashes"', '{"hash": 1}', 'f("hash") == 1']
)
def test_the_search_finds_nothing_else(line):
    assert list(names_known_in(line, {"hash"})) == []

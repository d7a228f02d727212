"""Operations on a model that is split over eight devices give what they give on one."""

import json

import jax
import numpy as np
import pytest

from dsmoe_jax.config import MeshConfig, replace
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.runs import json_files
from dsmoe_jax.surgery import OPERATIONS, Subject
from tests.surgery import test_upcycling
from tests.tools.tiny import tiny
from tests.tools.trees import by_path

MIXTURE = tiny(**{"model.moe.n_routed_experts": 8})
DENSE = replace(tiny(), **{**test_upcycling.DENSE, "model.hidden_size": 32})
# Two experts a device before, one or two after.
CASES = {
    "place": (MIXTURE, {"devices": 4, "places": 8}),
    "prune": (MIXTURE, {"by": "weights", "keep": 4}),
    "merge": (MIXTURE, {"by": "aligned", "keep": 4}),
    "extract": (MIXTURE, {"keep": 4}),
    "upcycle": (DENSE, {"copies": 4, "parts": 2, "shared": 0, "noise": 0.1}),
    "quantise": (MIXTURE, {}),
}


def rounded(report):
    """Sums over devices round in another order."""
    return json.loads(json_files.dumps(report), parse_float=lambda text: round(float(text), 6))


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", CASES)
def test_a_mesh_changes_no_operation(name, tmp_path):
    config, changed = CASES[name]
    own = {key: option.default for key, option in OPERATIONS[name].options.items()} | changed
    if "loads" in own:
        load = {"load": [[80, 70, 5, 5, 60, 50, 4, 6]] * 2}
        (tmp_path / "evaluation.json").write_text(json.dumps(load))
        own["loads"] = str(tmp_path / "evaluation.json")
    rng = np.random.default_rng(0)
    shapes = model_shapes(config.model)
    values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    alone = OPERATIONS[name].run(Subject(config, jax.device_put(values)), own)
    with jax.set_mesh(make_mesh(MeshConfig(expert=4, fsdp=2))):
        state = jax.device_put(values, sharding.shardings(shapes))
        split = OPERATIONS[name].run(Subject(config, state), own)
        wanted = by_path(sharding.shardings(model_shapes(split.config.model)))
    assert split.config == alone.config
    assert rounded(split.report) == rounded(alone.report)
    there, here = by_path(alone.model), by_path(split.model)
    assert there.keys() == here.keys()
    for path, x in here.items():
        np.testing.assert_array_equal(x, there[path], err_msg=path)
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path

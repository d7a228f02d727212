"""Draws the load of every expert and MaxVio over training, layer by layer, for one or more runs.

python -m dsmoe_jax plot_load --workdir=runs/dsmoe --out=load.png
python -m dsmoe_jax plot_load --workdir=runs/without --workdir=runs/with --out=load.svg

Reads metrics.jsonl; a run need not be finished.
"""

from __future__ import annotations

from absl import flags

from dsmoe_jax.config.paths import local_path
from dsmoe_jax.report.load_over_training import draw
from dsmoe_jax.report.style import styled
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.study.histories import Loads, loads_of

_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
_OUT = flags.DEFINE_string("out", None, "Picture to write: .png, .svg or .pdf.")


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value or not _OUT.value:
        raise ValueError("--workdir, --out: both are needed, for example --out=load.png")
    out = local_path("--out", _OUT.value)
    if out.exists():
        raise ValueError(f"--out={_OUT.value}: exists already; name a new file")
    with styled():
        draw({workdir: _loads(workdir) for workdir in _WORKDIR.value}).savefig(out)
    print(out)


def _loads(workdir: str) -> Loads:
    loads = loads_of(read_rows(workdir))
    if loads is None:
        raise ValueError(f"--workdir={workdir}: no row of metrics.jsonl has a load")
    return loads

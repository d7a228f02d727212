"""Measures: numbers by which runs are compared.

A new one is a function in readings.py and an entry in the table of its kind:

    training.py   how good the model became, and what it cost
    load.py       how evenly experts and devices are used
    inside.py     what experts serve, and how alike they are
    changed.py    a model whose experts were masked, merged, left out or quantised
"""

from __future__ import annotations

from dsmoe_jax.study.measures.changed import CHANGED
from dsmoe_jax.study.measures.inside import INSIDE
from dsmoe_jax.study.measures.load import OF_LOAD
from dsmoe_jax.study.measures.load import RUNNING as RUNNING
from dsmoe_jax.study.measures.measure import LOAD as LOAD
from dsmoe_jax.study.measures.measure import RESULTS as RESULTS
from dsmoe_jax.study.measures.measure import Measure as Measure
from dsmoe_jax.study.measures.training import TRAINING

# In the order of the columns of a table.
MEASURES: dict[str, Measure] = {**TRAINING, **OF_LOAD, **INSIDE, **CHANGED}


def check_names(owner: str, names: tuple[str, ...]) -> None:
    """Refuses names that are not measures.

    Raises:
      ValueError: naming the owner and the measure.
    """
    for name in names:
        if name not in MEASURES:
            known = ", ".join(MEASURES)
            raise ValueError(f"{owner}: measure {name!r}: must be one of {known}")

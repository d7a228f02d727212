"""DeepSeekMoE 2B: 1 shared and 63 routed experts of quarter width, 7 of them activated (V1 4.1).

    python -m dsmoe_jax train --config=configs/dsmoe_2b.py:demo --workdir=DIR

Options give the variants of V1: with `split=m`, 16 standard FFNs are cut into 16 m experts of 1/m
the width and 2 m are activated; `shared` of these are always active (V1 eqs. 6-11).
V1 figure 3 is gshard_2b, then `:paper,split=1`, `:paper,split=2` and this config; the shared
experts of section 4.4 are `:paper,shared=1`, `shared=2` and `shared=4`.  `width_percent` and
`steps_percent` give a wider or narrower model and a longer or shorter run (`base.resized`).

V1 table 1, 100B tokens: Pile loss 1.808 with 2.0B parameters, 0.3B activated, 4.3T FLOPs per 2K
tokens; 1 / 2 / 4 shared experts 1.808 / 1.806 / 1.811.
"""

from configs import base
from dsmoe_jax.planning import papers


def setup(
    split: int = 4, shared: int = 1, width_percent: int = 100, steps_percent: int = 100
) -> base.Setup:
    """16 standard FFNs cut into `split` experts each; 2 `split` are activated, `shared` always."""
    total = 16 * split
    activated = 2 * split
    if split < 1 or not 0 <= shared < activated:
        raise ValueError(
            f"split={split}, shared={shared}: split must be > 0 and shared below the {activated}"
            " activated experts"
        )
    name = "dsmoe_2b"
    if split != 4:
        name += f"_split{split}"
    if shared != 1:
        name += f"_shared{shared}"
    name += resized_name(width_percent, steps_percent)
    return base.Setup(
        name,
        papers.V1["dsmoe_2b"].settings,
        n_shared_experts=shared,
        n_routed_experts=total - shared,
        num_experts_per_tok=activated - shared,
        nominal_width=1 / split,
        width_percent=width_percent,
        steps_percent=steps_percent,
    )


def resized_name(width_percent: int, steps_percent: int) -> str:
    """End of the name of a model of another width or number of steps."""
    name = f"_width{width_percent}" if width_percent != 100 else ""
    return name + (f"_steps{steps_percent}" if steps_percent != 100 else "")


def get_config(arg: str = "paper"):
    scale, options = base.parse(arg, split=4, shared=1, width_percent=100, steps_percent=100)
    return base.build(setup(**options), scale)

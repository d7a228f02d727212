"""DeepSeekMoE 2B at other widths and learning rates, with and without muP.

    python -m dsmoe_jax train --config=configs/dsmoe_2b_widths.py:demo --workdir=DIR

Options (`:demo,width=200,mup=1`) are shares of the scale's own settings in per cent: `width` of
the hidden size, the heads and the experts' width (the head size stays), `rate` of the peak learning
rate, `steps` of the steps.  Without muP the initial deviation is the scale's times width^-1/2, as
between the scales of base.py; with `mup=1` the scale's own width is the base
(dsmoe_jax/model/mup.py).

2203.03466 (section 7) and 2508.09752 find that with muP the best rate stays where it is over
widths.
"""

from configs import base, dsmoe_2b
from dsmoe_jax.config import from_config_dict, replace, to_config_dict


def get_config(arg: str = "paper"):
    scale, options = base.parse(arg, width=100, rate=100, steps=100, mup=0)
    config = from_config_dict(base.build(dsmoe_2b.setup(), scale))
    model = config.model
    heads = model.attention.num_attention_heads
    width = options["width"] / 100
    if not width or heads * options["width"] % 100:
        raise ValueError(
            f"width={options['width']}: must be per cent of the {heads} heads that make a whole"
            " number of heads"
        )
    if options["mup"] not in (0, 1):
        raise ValueError(f"mup={options['mup']}: must be 0 or 1")
    base_width = model.hidden_size if options["mup"] else None
    deviation = model.initializer_range * (1 if options["mup"] else width**-0.5)
    changed = replace(
        config,
        **{
            "name": "dsmoe_2b_widths",
            "model.hidden_size": round(width * model.hidden_size),
            "model.intermediate_size": round(width * model.intermediate_size),
            "model.moe.moe_intermediate_size": round(width * model.moe.moe_intermediate_size),
            "model.attention.num_attention_heads": round(width * heads),
            "model.attention.num_key_value_heads": round(width * heads),
            "model.initializer_range": deviation,
            "model.mup_base_width": base_width,
            "optimizer.peak_learning_rate": (
                config.optimizer.peak_learning_rate * options["rate"] / 100
            ),
            "train.steps": config.train.steps * options["steps"] // 100,
        },
    )
    return to_config_dict(changed)

r"""Costs of models: to train, to hold, to decode; and where dense and sparse cost the same.

python -m dsmoe_jax economics --config=configs/dsmoe_16b.py --config=configs/deepseek_7b.py
python -m dsmoe_jax economics --config=configs/dsmoe_16b.py --config=configs/deepseek_7b.py \
    --chip=v5e --context=512 --batch=1 --batch=64 --mfu=0.4 --prices=prices.toml --rate=2000
python -m dsmoe_jax economics --config=configs/dsmoe_2b.py:demo --loads=runs/dsmoe/evaluation.json

Arithmetic on the data sheet of --chip, without the network: bounds of time, not forecasts.  A batch
reads the experts that some of its tokens choose: by expectation if all are equally likely, or by
the recorded --loads (see `surgery`).  The first model is compared with each of the others: the
batches at which each is faster, the tokens after which training and serving have cost the same, the
traffic below which fewer chips are cheaper, and with --rate the price of memory that decides.

There are no prices in here.  --prices names a table of your own:

    currency = "EUR"
    [chip_hour]
    v5e = 1.0
"""

from __future__ import annotations

import numpy as np
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import Config
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import economics_report, prices
from dsmoe_jax.runs import json_files, loads

command_line.define_configs()
_CHIP = flags.DEFINE_enum("chip", "h100", [*CHIPS], "The chip.")
_BATCH = flags.DEFINE_multi_integer(
    "batch", [1, 8, 64, 512], "Sequences decoded together; may be repeated.", lower_bound=1
)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of each in the cache; a sequence of training if not given.", 1
)
_MFU = flags.DEFINE_float(
    "mfu", 1.0, "Share of the peak that training reaches; 1 is a bound.", 0.0, 1.0
)
_WEIGHT_BITS = flags.DEFINE_integer("weight_bits", 16, "Of a weight in decoding.", 1)
_EXPERT_BITS = flags.DEFINE_integer(
    "expert_bits",
    None,
    "Of a weight of a routed expert; --weight_bits if not given.  Quantised ones have their own.",
    1,
)
_PRICES = flags.DEFINE_string("prices", None, "Table of prices, TOML.")
_RATE = flags.DEFINE_float("rate", None, "Tokens served in a second, for the price of memory.", 0.0)
_LOADS = flags.DEFINE_string(
    "loads", None, "Recorded loads of the experts of the first model, as `surgery place` has them."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")


def main() -> None:
    """Runs the command."""
    configs = command_line.configs()
    if _MFU.value == 0:
        raise ValueError("--mfu=0.0: must be above 0")
    table = None if _PRICES.value is None else prices.read(_PRICES.value, _CHIP.value)
    setting = economics_report.Setting(
        _CHIP.value,
        sorted(set(_BATCH.value)),
        _CONTEXT.value or configs[0].data.sequence_length,
        _MFU.value,
        _WEIGHT_BITS.value,
        _EXPERT_BITS.value or _WEIGHT_BITS.value,
        table,
        _RATE.value,
    )
    recorded = [_load(configs[0]), *([None] * (len(configs) - 1))]
    found = economics_report.report(configs, setting, recorded)
    print(json_files.dumps(found) if _JSON.value else economics_report.text(found, table))


def _load(config: Config) -> np.ndarray | None:
    """The recorded load of the first model's experts, (L, E)."""
    if _LOADS.value is None:
        return None
    load_SLE = loads.read(_LOADS.value, config, "--loads")
    return load_SLE.sum(axis=0)[: len(config.model.moe_layers)]

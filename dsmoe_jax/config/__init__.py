"""Every setting of a run: frozen dataclasses by section, checked when they are built.  No jax.

Read `run` first, then `moe`; `stages` has the config of each stage of a run, `trees` the dotted
keys.
"""

from dsmoe_jax.config.data import DataConfig
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.config.model import AttentionConfig, ModelConfig, MTPConfig, RopeScaling
from dsmoe_jax.config.moe import (
    BalanceTerm,
    DispatchConfig,
    DropConfig,
    ExpertConfig,
    MoEConfig,
    QuantisedConfig,
    RouterConfig,
    Schedule,
)
from dsmoe_jax.config.optimizer import OptimizerConfig
from dsmoe_jax.config.run import (
    Config,
    differences,
    from_config_dict,
    from_saved,
    replace,
    to_config_dict,
)
from dsmoe_jax.config.stages import Stage, stage_of, stages_of, tokens_after
from dsmoe_jax.config.train import DistillationConfig, SpikesConfig, TrainableConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "BalanceTerm",
    "Config",
    "DataConfig",
    "DispatchConfig",
    "DistillationConfig",
    "DropConfig",
    "ExpertConfig",
    "FrozenDict",
    "MTPConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "QuantisedConfig",
    "RopeScaling",
    "RouterConfig",
    "Schedule",
    "SpikesConfig",
    "Stage",
    "TrainConfig",
    "TrainableConfig",
    "differences",
    "from_config_dict",
    "from_saved",
    "replace",
    "stage_of",
    "stages_of",
    "to_config_dict",
    "tokens_after",
]

"""Models of Hugging Face: `load(DIR)` gives one of ours, `python -m dsmoe_jax convert` writes them.

tables     the names of the tensors, and which of our arrays each one holds
families   the registry: for each model_type its tables, and which of its keys is which of ours
configs    config.json -> our config, and back
files      safetensors: blocks of tensors, shards
loading    a model from a directory;  saving, the other way
workdirs   a workdir from a directory, and back
agreement  ours beside transformers, layer by layer
"""

from dsmoe_jax.hf.loading import load

__all__ = ["load"]

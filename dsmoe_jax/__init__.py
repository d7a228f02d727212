"""dsmoe_jax: DeepSeekMoE and its rivals in JAX/Flax.  Start reading at `dsmoe_jax/moe/layer.py`."""

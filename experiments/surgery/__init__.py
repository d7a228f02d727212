"""Trained models that were changed: `dsmoe_jax/surgery`, and distillation."""

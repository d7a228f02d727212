"""Experiments with made-up training."""

from made_up_runs import fake_run

__all__ = ["fake_run"]

"""The steps after which a run logs, evaluates, analyses and saves, as its config says."""

from __future__ import annotations

from dsmoe_jax.config import Config, stages_of


class Due:
    """Says by the number of a step what comes after it; step 0 is before the first.

    Args:
      config: of the run.
      replays: whether its routing is that of a recording.
    """

    def __init__(self, config: Config, *, replays: bool):
        self._train = config.train
        self._replays = replays
        self._ends = {stage.end for stage in stages_of(config)}

    def row(self, step: int) -> bool:
        """Whether a step has a row in the log."""
        asked = step == 1 or step % self._train.log_every == 0 or step in self._ends
        return asked or self.analysis(step) or self.evaluation(step)

    def evaluation(self, step: int) -> bool:
        """Whether the model is measured on held-out text."""
        train = self._train
        if step == 0:  # what it begins with has been trained; a recording has no such pass
            return train.start_from is not None and not self._replays
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def analysis(self, step: int) -> bool:
        """Whether tables of the routing are made."""
        train = self._train
        if train.analyse_every is None:
            return False
        return step > 0 and (step == train.steps or step % train.analyse_every == 0)

    def checkpoint(self, step: int) -> bool:
        """Whether the state is saved."""
        train = self._train
        if train.keep_best is not None and self.evaluation(step):
            return True
        periods = (train.checkpoint_every, train.keep_every or train.checkpoint_every)
        return step == train.steps or any(step % period == 0 for period in periods)

    def pause(self, step: int) -> bool:
        """Whether the step must be finished, and seen to be finite, before the next one begins."""
        looks = self.evaluation(step) or self.analysis(step)
        return looks or self.checkpoint(step) or step in self._ends

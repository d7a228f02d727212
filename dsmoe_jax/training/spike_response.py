"""The response of a run to the spikes that `spikes.py` sees: it says so, skips, or goes back."""

from __future__ import annotations

from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs import events
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.training import spikes
from dsmoe_jax.training.spikes import Decisions, Judged


class SpikeResponse:
    """Acts on the judged steps of a run, and notes each spike among its events.

    Args:
      config: of the run.
      journal: its events.
      line: its progress line.

    Attributes:
      decisions: what was skipped and left out so far.
    """

    def __init__(self, config: Config, journal: Journal, line: ProgressLine):
        self.decisions = Decisions(config)
        self._config = config
        self._journal = journal
        self._line = line
        self._to_rewind: tuple[int, Judged] | None = None

    @property
    def must_rewind(self) -> bool:
        """Whether the run must go back before its next step."""
        return self._to_rewind is not None

    def takes_out(self, step: int, judged: Judged | None) -> bool:
        """Acts on the judgement of a step; returns whether the step is no part of the run.

        Args:
          step: its number.
          judged: fetched from the device; None for a run without a rule.

        Raises:
          TooManySpikes: if so many steps in a row were skipped.
        """
        if judged is None or not judged.is_spike:
            return False
        action = self.decisions.action
        if action.rewinds:
            self._to_rewind = step, judged
            return True
        self._note(step, judged)
        if action.skips:
            self.decisions.skip(step, judged)
        return action.skips

    def rewind(self, to_step: int) -> None:
        """Notes the return to a checkpoint, and leaves out the data that were read since.

        Raises:
          TooManySpikes: if the run went back to that step so often already.
        """
        assert self._to_rewind is not None
        step, judged = self._to_rewind
        self._to_rewind = None
        assert to_step < step, "a step is judged before it is saved"
        self._note(step, judged, to_step=to_step)
        self.decisions.rewind(step, to_step)

    def _note(self, step: int, judged: Judged, **more: Any) -> None:
        rule = self._config.train.spikes
        assert rule is not None
        found = spikes.details(step, judged) | more
        self._journal.add(events.SPIKE, action=rule.action, watch=rule.watch, **found)
        told = ", ".join(f"{key.replace('_', ' ')} {value:.5g}" for key, value in found.items())
        self._line.message(f"{self._config.name}: spike: {rule.action}: {told}")

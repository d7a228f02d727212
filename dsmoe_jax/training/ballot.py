"""The two decisions that all processes must take after the same step: to stop, and to save.

A signal may reach one process alone, and the clock of the first one says when the next checkpoint
is due.  A process that acted on what it alone knows would leave the others waiting in a collective,
so after each step all of them vote, and what they have voted for counts when that step is fetched.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from dsmoe_jax.parallel import hosts
from dsmoe_jax.training.interrupt import Interrupts
from dsmoe_jax.training.saving import SaveTimer


class Ballot:
    """The votes of a call of `train`.

    Args:
      interrupts: the signals that this process is sent.
      save_timer: says when a checkpoint is due; that of the first process counts.
      mesh: of the run, over whose devices the votes travel.
    """

    def __init__(self, interrupts: Interrupts, save_timer: SaveTimer, mesh: Mesh):
        self._interrupts = interrupts
        self._save_timer = save_timer
        self._vote = hosts.Vote(mesh)
        self._voted_to_save = False

    @property
    def signum(self) -> int | None:
        """The signal that all processes stop for; None for none."""
        return self._interrupts.signum

    @property
    def asks_to_save(self) -> bool:
        """Whether the state is to be saved now, whatever the config says about this step."""
        return self._voted_to_save or self.signum is not None

    def cast(self) -> jax.Array | int:
        """Begins a vote, which nobody waits for; to be fetched, then `hear`."""
        due = hosts.is_first() and self._save_timer.is_due()
        return self._vote(2 * self._interrupts.noted + due)

    def hear(self, vote: jax.Array | int) -> None:
        """Takes up what was voted for; with a signal everything is saved anyway."""
        signum, due = divmod(int(vote), 2)
        self._interrupts.hear(signum)
        self._voted_to_save = self._voted_to_save or due == 1

    def settle_saving(self) -> None:
        """Notes that the state is saved, which was asked for."""
        self._voted_to_save = False

"""Several processes that train one model: how they connect, and the decisions they share.

Every process runs the same program.  The first one alone writes what is not an array (metrics,
config, progress line).  A decision that depends on a file or a signal is made by one process and
sent to all, because a process that takes another branch leaves the others waiting in a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe_jax.config import Config, differences, from_config_dict, to_config_dict

HEARTBEAT_SECONDS = 30  # a process silent for so long is taken for dead, and the others end
CONNECT_SECONDS = 300  # a process that starts waits so long for the others to start
SHUTDOWN_SECONDS = 20  # a process that ends waits so long for the others to end


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
) -> None:
    """Connects to the other processes of the run; call it before anything else of JAX.

    Args:
      coordinator_address: HOST:PORT of the first process; with it the next two must be given.
      num_processes: of the run.
      process_id: the number of this one, from 0.
      distributed: True where only JAX can tell (a TPU pod); None looks at the environment.

    Raises:
      ValueError: if only some of the three are given.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"--{missing[0]}: missing; --{', --'.join(given)} belong together")
    if missing and not (detected() if distributed is None else distributed):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for interrupt.py
    jax.distributed.initialize(
        **given,
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


class OnlyHere(OSError):
    """An error of this process alone, in the middle of what it does together with the others.

    They wait for it, and threads of libraries here for them: the process must end at once, which
    tells the others.

    Attributes:
      exit_code: EX_TEMPFAIL: the reason may be that another process has ended a moment before.
    """

    exit_code = 75


def end_soon(code: int) -> None:
    """Ends this process after a while, if it is one of several and cannot end by itself.

    For one that ends with an error.  The others may wait for it in a collective, and threads of
    libraries here, which Python joins, for them: a checkpoint that is being written is finished by
    all together.
    """
    if jax.distributed.is_initialized():
        timer = threading.Timer(SHUTDOWN_SECONDS + 10, os._exit, [code])
        timer.daemon = True
        timer.start()


def detected() -> bool:
    """Whether a launcher has started several processes: Slurm tasks, or hosts of a GKE TPU slice.

    On TPU VMs nothing in the environment says so.
    """
    slurm_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return slurm_tasks > 1 or len(tpu_hosts) > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values (JSON) of all processes, in order; waits for all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


class FailedOnFirst(ValueError):
    """A failure of the first process in what it did for all.

    Attributes:
      exit_code: of the error there: all processes end alike, and a launcher knows what to do.
    """

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def on_first(action: Callable[[], Any]) -> Any:
    """Runs `action` on the first process and sends what it returns (JSON) to all.

    Raises:
      FailedOnFirst: on all, if it raised a ValueError or an OSError.
    """
    if jax.process_count() == 1:
        return action()
    outcome = None
    raised = None
    if is_first():
        try:
            outcome = {"value": action()}
        except (ValueError, OSError) as error:
            raised = error
            outcome = {"error": str(error), "exit_code": getattr(error, "exit_code", 2)}
    outcome = gather(outcome)[0]
    if "error" in outcome:
        raise FailedOnFirst(outcome["error"], outcome["exit_code"]) from raised
    return outcome["value"]


def first_then_all(action: Callable[[], Any]) -> Any:
    """Runs `action` on the first process, then on the others, which find its files finished."""
    results: list[Any] = []
    on_first(lambda: results.append(action()))
    return results[0] if results else action()


def require_same_config(config: Config) -> None:
    """Refuses a run whose processes were given different configs.

    Raises:
      ValueError: on all of them, with the keys and values that differ.
    """
    first, *others = (from_config_dict(c) for c in gather(to_config_dict(config).to_dict()))
    for process, other in enumerate(others, start=1):
        if changed := differences(first, other):
            listing = "; ".join(f"{key}: {a!r} and {b!r}" for key, (a, b) in changed.items())
            raise ValueError(
                f"--config: processes 0 and {process} were given different ones ({listing});"
                " all must be given the same"
            )


def require_same(key: str, value: str) -> None:
    """Refuses a run whose processes see different values of `key`.

    Raises:
      ValueError: on all of them, with both values.
    """
    values = gather(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"{key}: {values[0]} on process 0, {other} on process {process}")


# With which errors of XLA and of its collectives begin.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


class AnotherEnded(OSError):
    """Another process of the run is gone; the same command goes on.

    Attributes:
      exit_code: of the process, so that a launcher can tell it from bad input: EX_TEMPFAIL.
    """

    exit_code = 75


@contextlib.contextmanager
def one_line_if_another_ends() -> Iterator[None]:
    """Turns JAX's error, when another process of the run has died, into one line.

    Raises:
      AnotherEnded: instead of `JaxRuntimeError`, or of the ValueError that it is in places.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if (ended := another_ended(error)) is None:
            raise
        raise ended from error


def another_ended(error: BaseException) -> AnotherEnded | None:
    """The one line, if an error is JAX's of a process that has left the others; else None."""
    if jax.process_count() == 1:
        return None
    if not (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))):
        return None
    return AnotherEnded(
        f"process {jax.process_index()}: another process has ended, or cannot be reached"
        f" ({str(error).splitlines()[0]}); start all of them again, the same command goes on"
        " from the last checkpoint"
    )


class Vote:
    """Maximum over the processes of a number (such as a signal's), as an array on the devices.

    It is computed between the steps and fetched with a step's metrics: no process waits for it, and
    all of them act on it at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._one_a_device = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, value: int) -> jax.Array | int:
        """The maximum over all processes; `value` itself if there is only one."""
        if jax.process_count() == 1:
            return value
        return self._largest(
            jax.make_array_from_callback(
                (self._one_a_device.num_devices,),
                self._one_a_device,
                lambda _: np.full(1, value, np.int32),  # the same on all devices of this process
            )
        )

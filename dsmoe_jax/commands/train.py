"""Trains a model, or continues an interrupted run: the same command does both.

python -m dsmoe_jax train --config=configs/dsmoe_2b.py:demo --workdir=runs/dsmoe
python -m dsmoe_jax train --config=configs/dsmoe_2b.py:demo --workdir=runs/wide \\
    --config.model.moe.n_shared_experts=2

The workdir then holds config.json, tokenizer.json, metrics.jsonl (one row a logged step),
checkpoints/, tensorboard/ and, when the run is finished, evaluation.json.  SIGTERM and Ctrl-C save
first.  A corpus that has moved is named anew by --config.data.corpus: it must be the same text.

What happens from some step on may change while a run is on its way; the change is recorded in
WORKDIR/history (runs/going_on.py).  Give the same command with, for example,

    --config.train.steps=1500 --config.train.schedule_steps=1000
        train a finished run of 1000 steps for longer, at the rate that its schedule ended with
    --config.train.skip_batches="((4001,20),)"
        after a spike: before step 4001 leave out 20 batches of the data
    --config.optimizer.rate_changes="((4001,0.5),)"
        from step 4001 on half of the schedule's learning rate
    --go_back
        the change is of steps that have been made: remove the checkpoints from there on and go on
        from the newest before it

A new run begins with the parameters of another one, with an optimizer and a schedule of its own, on
any text of the same tokenizer: --config.train.start_from=OTHER_WORKDIR.  Checkpoints that are never
pruned: --config.train.keep_every=1000, --config.train.keep_best=1.  More in docs/going_on.md.

Beside the text a run may learn from a trained model, as a dense student of a mixture:
--config.train.distillation.teacher=OTHER_WORKDIR, see docs/distillation.md.

How a run goes: open WORKDIR/report.html, a page that the run writes anew every minute
(--report_every) and that a browser loads anew by itself, or ask `python -m dsmoe_jax status`.
Beside TensorBoard, --wandb=PROJECT logs to Weights & Biases (WANDB_MODE=offline: to WORKDIR/wandb).

Jumps of the loss: --config.train.spikes.action=warn, skip (the update) or rewind (to the newest
checkpoint, past the data since); a run on its way takes it with --config.train.spikes.from_step=N.

Where the time of a step goes, by the parts of the model: --profile=5 traces five steps, see
docs/profiles.md.

The workdir and the corpus may be in a bucket, --workdir=gs://bucket/run, see docs/pods.md.

On more than one device a self-check comes first: one tiny step of the run's router, dispatcher and
expert backend on its mesh, beside the dense loop on one device.  A wrong value or gradient ends the
run before it writes anything, with the devices and the leg that are wrong; --noself_check leaves it
out.  In every step rows sent must be rows computed and dropped, and every balance bias must move.

On several hosts the same command is started once a host, with a workdir that all of them see.
Slurm and GKE are recognised; on TPU VMs say --distributed, elsewhere (two processes on one machine,
for example) --coordinator_address, --num_processes and --process_id.  See docs/pods.md.
"""

from __future__ import annotations

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.parallel import hosts
from dsmoe_jax.report.live import LiveReport
from dsmoe_jax.runs import wandb_board
from dsmoe_jax.training.loop import train

command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, or gs://BUCKET/FOLDER; created if missing."
)
_GO_BACK = flags.DEFINE_bool("go_back", False, "Leave the steps that another config changes.")
_PROFILE = flags.DEFINE_integer("profile", None, "Trace so many steps for xprof.", lower_bound=1)
_REPORT_EVERY = flags.DEFINE_float(
    "report_every", 60.0, "Seconds between two pages WORKDIR/report.html; 0: none.", lower_bound=0
)
_WANDB = flags.DEFINE_string(
    "wandb", None, "Project of Weights & Biases, which gets the numbers too (extra: wandb)."
)
_SELF_CHECK = flags.DEFINE_bool(
    "self_check",
    None,
    "First compare one tiny step of router, dispatcher and experts on these devices with the dense"
    " loop; by default on more than one.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Join the processes on other hosts; by default if Slurm or GKE say so."
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process.", lower_bound=0)


def main() -> None:
    """Runs the command."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    if _WANDB.value is not None:
        wandb_board.check(_WANDB.value, _WORKDIR.value)
    config = command_line.config()  # an error is raised before other processes wait for this one
    keep_freed_memory()
    hosts.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
    watch = LiveReport(_REPORT_EVERY.value) if _REPORT_EVERY.value else None
    with hosts.one_line_if_another_ends():
        result = train(
            config,
            _WORKDIR.value,
            go_back=_GO_BACK.value,
            profile=_PROFILE.value,
            watch=watch,
            wandb=_WANDB.value,
            self_check=_SELF_CHECK.value,
        )
    held_out = result.evaluation
    if hosts.is_first():
        before = held_out.get("before")
        began = "" if before is None else f" (before: {before['loss']:.4f})"
        print(
            f"step {result.step}: held-out loss {held_out['loss']:.4f} nats per token{began},"
            f" {held_out['bits_per_byte']:.4f} bits per byte"
        )

"""Converts a Hugging Face model to a workdir, and a workdir to a Hugging Face model.

python -m dsmoe_jax convert --from_hf=models/Qwen1.5-MoE-A2.7B --to=runs/qwen
python -m dsmoe_jax generate --workdir=runs/qwen --prompt="The "
python -m dsmoe_jax convert --from=runs/dsmoe --to_hf=models/mine --dtype=bfloat16
python -m dsmoe_jax convert --check --from_hf=models/Qwen1.5-MoE-A2.7B --json

A Hugging Face model is a directory as `save_pretrained` writes it: config.json, and safetensors
files with or without an index.  Its model_type must be one of deepseek (V1), deepseek_v2,
deepseek_v3, llama, mixtral, olmoe, qwen2_moe, qwen3_moe.  Weights are read tensor by tensor, in
float32, float16, bfloat16 or V3's 8 bits with a scale for each block; ours are float32.  In Python,
`dsmoe_jax.hf.load(DIR)` gives the model.

The workdir has one checkpoint, step 0.  `evaluate --corpus=TEXT`, `generate`, and a training with
`train.start_from` take it.  It keeps the tokenizer with its chat template, which go back with the
model, and with those that were trained from it.

The other way the architecture follows from the config; a model that none of them expresses is
refused, by the keys that stand in its way.  transformers has no class for V1: its files name the
released modelling code.

--check compares our model with transformers', which must be installed, layer by layer, each time
from transformers' own input to that layer: the share of the chosen experts that are the same, and
the largest errors of gates and of outputs.  --against=BACKEND compares the model on --mesh with
itself on one device, its experts computed by that backend (loop, ragged_dot, ...):

python -m dsmoe_jax convert --check --from=runs/dsmoe --against=loop --mesh=fsdp=2,expert=4

Either way it says how much memory it will hold, and how much it held: pieces of tensors, not a
model and not a file.  Nothing that exists is overwritten, and nothing is left half-written.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.hardware.host_memory import HeldMemory, return_freed_memory
from dsmoe_jax.hf import agreement, loading, workdirs
from dsmoe_jax.hf.files import WRITTEN
from dsmoe_jax.hf.saving import SHARD_BYTES
from dsmoe_jax.progress import duration
from dsmoe_jax.runs import json_files

command_line.define_mesh()
_FROM_HF = flags.DEFINE_string("from_hf", None, "Directory of a Hugging Face model.")
_TO = flags.DEFINE_string("to", None, "Workdir to make of it.")
_FROM = flags.DEFINE_string("from", None, "Workdir of a run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of --from; the newest if not given.")
_TO_HF = flags.DEFINE_string("to_hf", None, "Directory of a Hugging Face model to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, [*WRITTEN], "Of the weights in --to_hf; float32 if not given."
)
_SHARD_GB = flags.DEFINE_float(
    "shard_gb", None, "The most that a file in --to_hf may have; 5 if not given."
)
_CHECK = flags.DEFINE_bool("check", False, "Compare the model with transformers'.")
_AGAINST = flags.DEFINE_string(
    "against", None, "For --check: an expert backend on one device, instead of transformers."
)
_TOKENS = flags.DEFINE_string(
    "tokens", None, "Token ids for --check, separated by commas; random ones if not given."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
    """Runs the command."""
    task = _task()
    start = time.monotonic()
    return_freed_memory()
    with jax.set_mesh(command_line.mesh()), HeldMemory() as held:
        result = task()
    if _CHECK.value:
        print(json_files.dumps(result) if _JSON.value else agreement.table(result))
        return
    result["seconds"] = time.monotonic() - start
    result["held_memory_bytes"] = held.peak
    print(json_files.dumps(result) if _JSON.value else _sentence(result))


def _task() -> Callable[[], dict[str, Any]]:
    """The task that the flags ask for.

    Raises:
      ValueError: for flags that do not belong together.
    """
    of_files = (_FROM_HF, _TO, _FROM, _STEP, _TO_HF, _DTYPE, _SHARD_GB)
    values = {flag.name: flag.value for flag in of_files}
    checks = {"check": _CHECK.value or None, _AGAINST.name: _AGAINST.value}
    mesh = flags.FLAGS["mesh"]
    values |= checks | {
        _TOKENS.name: _TOKENS.value,
        mesh.name: mesh.value if mesh.present else None,
    }
    given = {name for name, value in values.items() if value is not None}
    for needed, others, task in _TASKS:
        if given >= needed:
            for name in sorted(given - needed - others):
                together = " ".join(f"--{flag}" for flag in sorted(needed))
                raise ValueError(f"--{name}={values[name]}: has no meaning beside {together}")
            return task
    raise ValueError(
        "convert needs --from_hf and --to, or --from and --to_hf, or --check and --from_hf;"
        " see --help"
    )


def _to_workdir() -> dict[str, Any]:
    made = workdirs.from_hf(_text(_FROM_HF), _text(_TO))
    return {"workdir": str(made), "step": workdirs.STEP}


def _to_hugging_face() -> dict[str, Any]:
    gigabytes = _SHARD_GB.value
    shard_bytes = SHARD_BYTES
    if gigabytes is not None:
        if not 0 < gigabytes < 1e6:
            raise ValueError(f"--shard_gb={gigabytes}: must be above 0")
        shard_bytes = round(gigabytes * 1e9)
    dtype = _DTYPE.value or "float32"
    made = workdirs.to_hf(_text(_FROM), _text(_TO_HF), _STEP.value, dtype, shard_bytes)
    return {
        "directory": str(made.place),
        "architecture": made.architecture,
        "step": made.step,
        "dtype": dtype,
    }


def _check_theirs() -> dict[str, Any]:
    if _AGAINST.value is None:
        return agreement.with_transformers(_text(_FROM_HF), _token_ids())
    open_model = functools.partial(loading.load_with_backend, _text(_FROM_HF))
    return agreement.with_backend(open_model, _AGAINST.value, _token_ids())


def _check_ours() -> dict[str, Any]:
    open_model = functools.partial(workdirs.load_with_backend, _text(_FROM), _STEP.value)
    return agreement.with_backend(open_model, _text(_AGAINST), _token_ids())


def _text(flag: flags.FlagHolder[str | None]) -> str:
    """The value of a flag that `_task` has seen to be there."""
    assert flag.value is not None
    return flag.value


def _token_ids() -> list[int] | None:
    if _TOKENS.value is None:
        return None
    try:
        return [int(item) for item in _TOKENS.value.split(",")]
    except ValueError:
        raise ValueError(f"--tokens={_TOKENS.value}: must be numbers separated by commas") from None


# The flags that say what is to be done, others that may be given, and what does it.
_TASKS: list[tuple[set[str], set[str], Callable[[], dict[str, Any]]]] = [
    ({"check", "from_hf"}, {"tokens", "against", "mesh"}, _check_theirs),
    ({"check", "from", "against"}, {"tokens", "step", "mesh"}, _check_ours),
    ({"from_hf", "to"}, {"mesh"}, _to_workdir),
    ({"from", "to_hf"}, {"step", "dtype", "shard_gb"}, _to_hugging_face),
]


def _sentence(result: dict[str, Any]) -> str:
    made = result.get("workdir") or f"{result['directory']} ({result['architecture']})"
    made_in = f"{made}: made in {duration(result['seconds'])}"
    held = result["held_memory_bytes"]
    return made_in if held is None else f"{made_in}, held at most {workdirs.size_text(held)}"

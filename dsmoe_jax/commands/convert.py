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
the largest errors of gates and of outputs.

Nothing that exists is overwritten, and nothing is left half-written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.hf import agreement, workdirs
from dsmoe_jax.hf.files import WRITTEN
from dsmoe_jax.progress import duration
from dsmoe_jax.runs import json_files

command_line.define_mesh()
_FROM_HF = flags.DEFINE_string("from_hf", None, "Directory of a Hugging Face model.")
_TO = flags.DEFINE_string("to", None, "Workdir to make of it.")
_FROM = flags.DEFINE_string("from", None, "Workdir of a run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of --from; the newest if not given.")
_TO_HF = flags.DEFINE_string("to_hf", None, "Directory of a Hugging Face model to write.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", [*WRITTEN], "Of the weights in --to_hf.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "The most that a file in --to_hf may have.")
_CHECK = flags.DEFINE_bool("check", False, "Compare the model in --from_hf with transformers'.")
_TOKENS = flags.DEFINE_string(
    "tokens", None, "Token ids for --check, separated by commas; random ones if not given."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
    """Runs the command."""
    task = _task()
    start = time.monotonic()
    with jax.set_mesh(command_line.mesh()):
        result = task()
    if _CHECK.value:
        print(json_files.dumps(result) if _JSON.value else agreement.table(result))
        return
    result["seconds"] = time.monotonic() - start
    result["peak_memory_bytes"] = workdirs.peak_memory()
    print(json_files.dumps(result) if _JSON.value else _sentence(result))


def _task() -> Callable[[], dict[str, Any]]:
    """What the flags ask for; refuses flags that do not belong together."""
    flags_of = {flag.name: flag.value for flag in (_FROM_HF, _TO, _FROM, _STEP, _TO_HF, _TOKENS)}
    given = {name for name, value in flags_of.items() if value is not None}
    for needed, (others, task) in _TASKS.items():
        if needed <= given and (_CHECK.value == (needed == _CHECKED)):
            for name in given - needed - others:
                raise ValueError(
                    f"--{name}={flags_of[name]}: does not belong to"
                    f" {' '.join(f'--{flag}' for flag in sorted(needed))}"
                )
            return task
    raise ValueError(
        "--from_hf and --to, or --from and --to_hf, or --check and --from_hf: must be given together"
    )


def _to_workdir() -> dict[str, Any]:
    made = workdirs.from_hf(_FROM_HF.value, _TO.value)
    return {"workdir": str(made), "step": workdirs.STEP}


def _to_hugging_face() -> dict[str, Any]:
    if not 0 < _SHARD_GB.value < 1e6:
        raise ValueError(f"--shard_gb={_SHARD_GB.value}: must be above 0")
    shard_bytes = round(_SHARD_GB.value * 1e9)
    made = workdirs.to_hf(_FROM.value, _TO_HF.value, _STEP.value, _DTYPE.value, shard_bytes)
    return {
        "directory": str(made.place),
        "architecture": made.architecture,
        "step": made.step,
        "dtype": _DTYPE.value,
    }


def _check() -> dict[str, Any]:
    return agreement.with_transformers(_FROM_HF.value, _token_ids())


def _token_ids() -> list[int] | None:
    if _TOKENS.value is None:
        return None
    try:
        return [int(item) for item in _TOKENS.value.split(",")]
    except ValueError:
        raise ValueError(
            f"--tokens={_TOKENS.value}: must be numbers separated by commas"
        ) from None


_CHECKED = frozenset({"from_hf"})
# The flags that say what is to be done -> others that may be given, and what does it.
_TASKS: dict[frozenset[str], tuple[frozenset[str], Callable[[], dict[str, Any]]]] = {
    frozenset({"from_hf", "to"}): (frozenset(), _to_workdir),
    frozenset({"from", "to_hf"}): (frozenset({"step"}), _to_hugging_face),
    _CHECKED: (frozenset({"tokens"}), _check),
}


def _sentence(result: dict[str, Any]) -> str:
    made = result.get("workdir") or f"{result['directory']} ({result['architecture']})"
    gigabytes = result["peak_memory_bytes"] / 1e9
    return f"{made}: made in {duration(result['seconds'])}, at most {gigabytes:.2f} GB in memory"

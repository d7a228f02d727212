"""Continues a prompt with a trained model.

python -m dsmoe_jax generate --workdir=runs/dsmoe --prompt="def main("
python -m dsmoe_jax generate --workdir=runs/dsmoe --prompt="The " --temperature=0.8 --top_p=0.9 \\
    --num_samples=3 --seed=1

The prompt is the beginning of a document: the model reads the end-of-text token, which comes
before every document it was trained on, and then the prompt.  So an empty prompt (--prompt="")
starts a new document.  A text ends where the model writes end-of-text, or after --max_new_tokens.
The default, --temperature=0, is greedy: the most likely token each time, and the same text on every
call.  Above 0 the same --seed gives the same texts.

No text depends on the others that are sampled with it: nothing is dropped, and each token goes to
experts of its own, also where the router lets the tokens of a batch compete.

Shapes: B samples, P tokens of the prompt, G generated tokens.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.model.sampling import generate, routing_notes
from dsmoe_jax.runs.loading import Writer, load_writer

command_line.define_mesh()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; '' starts a new document.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "Stop after this many tokens, if the text has not ended.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Divides the logits before sampling; 0 is greedy.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Samples from the smallest set of tokens whose probabilities reach this sum; 1 is all.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many texts to sample.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the texts.")


class Sample(NamedTuple):
    """One continuation: its text, its tokens without the end-of-text, and whether it ended."""

    text: str
    tokens: int
    ended: bool


def main() -> None:
    """Runs the command."""
    workdir, prompt = _checked_flags()
    with jax.set_mesh(command_line.mesh()):
        _generate(workdir, prompt)


def _generate(workdir: str, prompt: str) -> None:
    run = load_writer(workdir, _STEP.value)
    prompt_P = [run.tokenizer.eos_id, *run.tokenizer.encode(prompt)]
    _note_length(run, len(prompt_P))
    for note in routing_notes(run.model.config.moe):
        print(note, file=sys.stderr)
    tokens_BG = generate(
        run.model,
        jnp.tile(jnp.array(prompt_P, jnp.int32), (_NUM_SAMPLES.value, 1)),
        _MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        allowed_V=run.tokenizer.may_be_written(run.config.model.vocab_size),
    )
    samples = [cut(tokens_G, run.tokenizer) for tokens_G in np.asarray(tokens_BG)]
    print(json.dumps(_result(run, prompt, samples)) if _JSON.value else _texts(prompt, samples))


def cut(tokens_G: np.ndarray, tokenizer: Tokenizer) -> Sample:
    """The generated text before the first end-of-text token; all of it if there is none."""
    ends = np.flatnonzero(tokens_G == tokenizer.eos_id)
    kept = tokens_G[: ends[0]] if ends.size else tokens_G
    return Sample(tokenizer.decode(kept.tolist()), len(kept), bool(ends.size))


def _checked_flags() -> tuple[str, str]:
    """Workdir and prompt; refuses wrong flags before anything is loaded."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    if _PROMPT.value is None:
        raise ValueError("--prompt: missing; --prompt='' starts a new document")
    try:
        prompt = os.fsencode(_PROMPT.value).decode()  # its bytes, whatever the locale made of them
    except UnicodeError as error:
        raise ValueError(f"--prompt={_PROMPT.value!r}: must be UTF-8") from error
    if not 0 < _TOP_P.value <= 1:
        raise ValueError(f"--top_p={_TOP_P.value}: must be above 0 and at most 1")
    if not np.isfinite(_TEMPERATURE.value):
        raise ValueError(f"--temperature={_TEMPERATURE.value}: must be finite")
    if _TEMPERATURE.value == 0:
        for flag, value, default in (("num_samples", _NUM_SAMPLES, 1), ("top_p", _TOP_P, 1.0)):
            if value.value != default:
                raise ValueError(
                    f"--{flag}={value.value}: changes nothing at --temperature=0, which always"
                    " takes the most likely token; raise --temperature"
                )
    return _WORKDIR.value, prompt


def _note_length(run: Writer, prompt_tokens: int) -> None:
    trained = run.config.data.sequence_length
    asked = prompt_tokens + _MAX_NEW_TOKENS.value
    if asked > trained:
        print(
            f"note: {prompt_tokens} + {_MAX_NEW_TOKENS.value} tokens go past the {trained} that"
            " the model was trained on; expect worse text there",
            file=sys.stderr,
        )


def _result(run: Writer, prompt: str, samples: list[Sample]) -> dict[str, Any]:
    return {
        "step": run.step,
        "prompt": prompt,
        "samples": [sample._asdict() for sample in samples],
    }


def _texts(prompt: str, samples: list[Sample]) -> str:
    """The prompt with its continuation; several are numbered."""
    texts = [prompt + sample.text for sample in samples]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"[{i}/{len(texts)}]\n{text}" for i, text in enumerate(texts, start=1))

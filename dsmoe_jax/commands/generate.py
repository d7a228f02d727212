"""Continues prompts with a trained model.

python -m dsmoe_jax generate --workdir=runs/dsmoe --prompt="def main("
python -m dsmoe_jax generate --workdir=runs/dsmoe --prompt="The " --temperature=0.8 --top_p=0.9 \\
    --num_samples=3 --seed=1
python -m dsmoe_jax generate --workdir=runs/dsmoe --prompt="def main(" --stream --stop="def "
python -m dsmoe_jax generate --workdir=runs/dsmoe --prompts_file=prompts.jsonl --json

A prompt is the beginning of a document: the model reads the end-of-text token, which comes before
every document it was trained on, and then the prompt.  So an empty prompt (--prompt="") starts a
new document.  Several prompts are given by several --prompt, or by a file with a JSON string on
each line, such as "To be\\n"; they may differ in length.

With --chat a prompt is a question, put as fine-tuning on conversations puts it: "User: QUESTION",
a blank line, "Assistant:".  The chat template of a converted model is not applied.

A text ends where the model writes end-of-text, before the first stop string (--stop, as often as
wanted), or after --max_new_tokens.  The default, --temperature=0, is greedy: the most likely token
each time, and the same text on every call.  Above 0 the same --seed gives the same texts.
--repetition_penalty, --temperature, --top_k and --top_p are applied in this order, as Hugging Face
transformers does.  The first counts prompt and end-of-text among the tokens that were there.

No text depends on the others that are sampled with it: nothing is dropped, each token goes to
experts of its own, also where the router lets the tokens of a batch compete, and every sample of a
prompt has random numbers of its own.

A model whose router chooses experts by task needs --task: the name of one, or of a domain of it.

--draft=mtp writes the greedy text in fewer passes, by a model that was trained with model.mtp, and
says how many drafted tokens were accepted.

--stream writes texts as they grow, one below the other: each begins when the one before is whole.
The speed, the bytes of the weights, and those of the cache for each token, go to stderr, or into
the JSON.  The latter stand beside the cache of a dense model with the same activated parameters A,
L layers and V tokens, with plain multi-head attention, a standard FFN of 8 D^2 parameters, and so
the hidden size D that solves 12 L D^2 + 2 V D = A (V D if embedding and head are tied): it keeps
2 L D numbers for each token.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from dsmoe_jax.commands import command_line, generation_report
from dsmoe_jax.commands.text_printer import TextPrinter
from dsmoe_jax.data import chat
from dsmoe_jax.data.growing_text import MAX_NEW_TOKENS, GrowingText
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.model.cache_size import cache_size
from dsmoe_jax.model.generation import CHUNK, generate, routing_notes
from dsmoe_jax.model.sampling import GREEDY, Sampling
from dsmoe_jax.model.size import weight_bytes
from dsmoe_jax.model.speculative import generate_drafted
from dsmoe_jax.moe.routers import task_number
from dsmoe_jax.progress import ProgressLine, Silent
from dsmoe_jax.runs.loading import Writer, load_writer
from dsmoe_jax.runs.workdir import read_config

command_line.define_mesh()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue; '' starts a new document.  May be given several times."
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "File of more prompts: a JSON string on each line."
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Prompts are questions to a model that was trained on conversations."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "Stop after this many tokens, if the text has not ended.", lower_bound=1
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "End a text before this string.  May be given several times."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", GREEDY.temperature, "Divides the logits before sampling; 0 is greedy."
)
_TOP_K = flags.DEFINE_integer(
    "top_k", GREEDY.top_k, "Samples from this many tokens, the most likely ones; all if not given."
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    GREEDY.top_p,
    "Samples from the smallest set of tokens whose probabilities reach this sum; 1 is all.",
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty",
    GREEDY.repetition_penalty,
    "Divides the positive logits of tokens that were there already, and multiplies the negative"
    " ones; 1 is none.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "How many texts to sample of each prompt.", lower_bound=1
)
_STREAM = flags.DEFINE_bool("stream", False, "Write the texts while they grow.")
_TASK = flags.DEFINE_string(
    "task", None, "Task of the texts, for a model whose router chooses experts by task."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the texts.")


class Request(NamedTuple):
    """The task that the command line asks for."""

    workdir: str
    prompts: list[str]
    sampling: Sampling
    stop_strings: list[str]


class Work(NamedTuple):
    """The texts that are to be written, a row for each sample of each prompt.

    Attributes:
      run: the model and its tokenizer.
      sampling: how tokens are drawn.
      prompts: as given.
      tokens: of each prompt, as the model reads it.
      sample_ids: of each text among those of its prompt.
      texts: what follows.
    """

    run: Writer
    sampling: Sampling
    prompts: list[str]
    tokens: list[list[int]]
    sample_ids: list[int]
    texts: list[GrowingText]

    @property
    def allowed_V(self) -> np.ndarray:
        """Tokens that may be generated."""
        return self.run.tokenizer.may_be_written(self.run.config.model.vocab_size)


def main() -> None:
    """Runs the command."""
    request = _checked_flags()
    with jax.set_mesh(command_line.mesh()):
        _generate(request)


def _generate(request: Request) -> None:
    task_number(read_config(request.workdir).model.moe, _TASK.value, "--task")
    run = load_writer(request.workdir, _STEP.value)
    work = _work(run, request)
    _note_length(run, max(map(len, work.tokens)))
    for note in routing_notes(run.model.config.moe):
        print(note, file=sys.stderr)
    beginnings = work.prompts
    if _CHAT.value:
        beginnings = [run.tokenizer.decode(tokens) for tokens in work.tokens]
    printer = TextPrinter(sys.stdout, beginnings, work.texts)
    facts = _write(work, printer) if _DRAFT.value is None else DRAFTS[_DRAFT.value](work)
    for text in work.texts:
        text.close()
    size = cache_size(run.config.model)
    weights = weight_bytes(run.config.model).total
    if _JSON.value:
        samples = [_sample(*pair) for pair in zip(work.prompts, work.texts, strict=True)]
        sizes = {"weight_bytes": weights, "cache": size._asdict()}
        print(json.dumps({"step": run.step, "samples": samples, **facts, **sizes}))
        return
    printer.show()
    print(
        generation_report.speed_line(facts["speed"]),
        generation_report.weights_line(weights),
        generation_report.cache_line(size),
        sep="\n",
        file=sys.stderr,
    )
    if "draft" in facts:
        print(generation_report.draft_line(facts["draft"]), file=sys.stderr)


def _work(run: Writer, request: Request) -> Work:
    n = _NUM_SAMPLES.value
    prompts = [prompt for prompt in request.prompts for _ in range(n)]
    return Work(
        run,
        request.sampling,
        prompts,
        [_prompt_ids(run.tokenizer, prompt) for prompt in prompts],
        [*range(n)] * len(request.prompts),
        [GrowingText(run.tokenizer, request.stop_strings) for _ in prompts],
    )


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens after which the model goes on."""
    if _CHAT.value:
        return chat.prompt_ids(tokenizer, [chat.Message("user", prompt)])
    return [tokenizer.eos_id, *tokenizer.encode(prompt)]


def _write(work: Work, printer: TextPrinter) -> dict[str, Any]:
    """Lets the texts grow; returns facts about it as JSON."""
    # A line that is rewritten would get between the texts.
    progress = Silent() if _STREAM.value else ProgressLine("generate", _MAX_NEW_TOKENS.value)

    def watch(news: list[list[int]]) -> np.ndarray:
        for text, tokens in zip(work.texts, news, strict=True):
            text.add(tokens)
        done = max(text.tokens for text in work.texts)
        if done < _MAX_NEW_TOKENS.value:  # the texts themselves say that all is done
            progress.update(done)
        if _STREAM.value:
            printer.show()
        return np.array([text.stop_reason is not None for text in work.texts])

    generated = generate(
        work.run.model,
        work.tokens,
        _MAX_NEW_TOKENS.value,
        sampling=work.sampling,
        seed=_SEED.value,
        sample_ids=work.sample_ids,
        allowed_V=work.allowed_V,
        eos_id=work.run.tokenizer.eos_id,
        watch=watch,
        chunk=1 if _STREAM.value else CHUNK,
        task=_TASK.value,
    )
    progress.close()
    decoded = generated.decoded_tokens
    return {"speed": generation_report.speed(generated.seconds, generated.prompt_tokens, decoded)}


def _write_drafted(work: Work) -> dict[str, Any]:
    """As `_write`, with the modules of multi-token prediction as a draft."""
    n = _MAX_NEW_TOKENS.value
    drafted = generate_drafted(
        work.run.model, work.tokens, n, allowed_V=work.allowed_V, task=_TASK.value
    )
    for text, tokens_G in zip(work.texts, drafted.tokens_BG, strict=True):
        text.add(tokens_G.tolist())
    draft = {
        "passes": drafted.passes,
        "proposed": drafted.proposed.tolist(),
        "accepted": drafted.accepted.tolist(),
        "acceptance": drafted.acceptance,
    }
    decoded = len(work.texts) * (n - 1)
    return {
        "speed": generation_report.speed(drafted.seconds, drafted.prompt_tokens, decoded),
        "draft": draft,
    }


DRAFTS: dict[str, Callable[[Work], dict[str, Any]]] = {"mtp": _write_drafted}
_DRAFT = flags.DEFINE_enum(
    "draft",
    None,
    [*DRAFTS],
    "Look ahead with a draft, for greedy text: mtp is the modules of multi-token prediction.",
)


def _checked_flags() -> Request:
    """The request; refuses wrong flags before anything is loaded."""
    if not _WORKDIR.value:
        raise ValueError("--workdir: missing; for example --workdir=runs/dsmoe")
    prompts = [_utf8("--prompt", prompt) for prompt in _PROMPT.value]
    if _PROMPTS_FILE.value is not None:
        prompts += _read_prompts(_PROMPTS_FILE.value)
    elif not prompts:
        raise ValueError("--prompt: missing; --prompt='' starts a new document")
    if _CHAT.value and not all(map(str.strip, prompts)):
        raise ValueError("--prompt='': with --chat it is a question, and must not be empty")
    stop_strings = [_utf8("--stop", string) for string in _STOP.value]
    if "" in stop_strings:
        raise ValueError("--stop='': must not be empty")
    if _STREAM.value and _JSON.value:
        raise ValueError("--stream=true: JSON is printed when all is done; leave out --json")
    if _STREAM.value and _DRAFT.value is not None:
        raise ValueError("--stream=true: a drafted text comes as a whole; leave out --draft")
    return Request(_WORKDIR.value, prompts, _sampling(), stop_strings)


def _sampling() -> Sampling:
    """Reads the flags of sampling; refuses those that change nothing."""
    try:
        sampling = Sampling(
            _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPETITION_PENALTY.value
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if sampling.temperature == 0:
        for flag in (_NUM_SAMPLES, _TOP_K, _TOP_P):
            if flag.value != flag.default:
                raise ValueError(
                    f"--{flag.name}={flag.value}: changes nothing at --temperature=0, which always"
                    " takes the most likely token; raise --temperature"
                )
    if _DRAFT.value is not None and sampling != GREEDY:
        raise ValueError(
            f"--draft={_DRAFT.value}: drafts greedy text alone; leave out --temperature and"
            " --repetition_penalty"
        )
    return sampling


def _utf8(flag: str, value: str) -> str:
    """The text of a flag's bytes, whatever the locale made of them."""
    try:
        return os.fsencode(value).decode()
    except UnicodeError as error:
        raise ValueError(f"{flag}={value!r}: must be UTF-8") from error


def _read_prompts(path: str) -> list[str]:
    """The prompts of a file, a JSON string on each line."""
    try:
        lines = Path(path).read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeError as error:
        raise ValueError(f"--prompts_file={path}: must be UTF-8") from error
    except OSError as error:
        raise ValueError(f"--prompts_file={path}: {error.strerror}") from error
    return [_read_prompt(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_prompt(path: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)
        prompt.encode()  # not an integer, nor half a surrogate pair
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f'--prompts_file={path}: line {number} must be a JSON string, such as "To be\\n"'
        ) from error
    return prompt


def _note_length(run: Writer, prompt_tokens: int) -> None:
    trained = run.config.data.sequence_length
    asked = prompt_tokens + _MAX_NEW_TOKENS.value
    if asked > trained:
        print(
            f"note: {prompt_tokens} + {_MAX_NEW_TOKENS.value} tokens go past the {trained} that"
            " the model was trained on; expect worse text there",
            file=sys.stderr,
        )


def _sample(prompt: str, text: GrowingText) -> dict[str, Any]:
    """A sample as JSON."""
    return {
        "prompt": prompt,
        "text": text.text,
        "tokens": text.tokens,
        "ended": text.stop_reason != MAX_NEW_TOKENS,
        "stop_reason": text.stop_reason,
    }

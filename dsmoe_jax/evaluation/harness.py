"""A trained model for the lm-evaluation-harness, which has hundreds of tasks (extra `eval`).

    import lm_eval
    from dsmoe_jax.evaluation.harness import HarnessModel
    from dsmoe_jax.runs.loading import load_writer

    model = HarnessModel(load_writer("runs/dsmoe"))
    results = lm_eval.simple_evaluate(model=model, tasks=["hellaswag"], limit=100)

Likelihoods are those of `likelihood.Scorer`, texts those of `model.generation`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmoe_jax.config.checks import require
from dsmoe_jax.data.growing_text import GrowingText
from dsmoe_jax.evaluation.likelihood import Encoded, Request, Scorer, different_windows, encode
from dsmoe_jax.model.generation import generate
from dsmoe_jax.model.sampling import Sampling
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs.loading import Writer

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("lm_eval is missing: pip install 'dsmoe_jax[eval]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class HarnessModel(LM):
    """A trained model as the harness asks for it.

    Args:
      run: the model and its tokenizer.
      max_length: tokens that it reads at once; None: `data.sequence_length` of the run.
      batch_size: sequences of this length at once.
      max_gen_toks: tokens that it writes, where a task does not say.
      task: of all texts, for a model whose router chooses by task.
    """

    def __init__(
        self,
        run: Writer,
        max_length: int | None = None,
        batch_size: int = 16,
        max_gen_toks: int = 256,
        task: str | None = None,
    ):
        super().__init__()
        self._run = run
        self._max_length = max_length or run.config.data.sequence_length
        self._batch_size = batch_size
        self._max_gen_toks = max_gen_toks
        self._task = task
        self._scorer = Scorer(run.model, self._max_length, batch_size, task)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one."""
        asked = [Request(*request.args) for request in requests]
        encoded = encode(self._run.tokenizer, asked)
        found = [tuple(one) for one in self._scored(encoded, disable_tqdm)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text in nats."""
        texts = [request.args[0] for request in requests]
        tokens = self._run.tokenizer.encode_batch(texts)
        encoded = [Encoded((self._run.tokenizer.eos_id,), tuple(ids)) for ids in tokens]
        found = [one.nats for one in self._scored(encoded, disable_tqdm)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model writes after each context, up to the first stop string.

        Raises:
          ValueError: for a setting that is not known here.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        line = None if disable_tqdm else ProgressLine("lm-eval", len(requests))
        texts: dict[int, str] = {}
        for settings, numbers in alike.items():
            for start in range(0, len(numbers), self._batch_size):
                batch = numbers[start : start + self._batch_size]
                contexts = [requests[number].args[0] for number in batch]
                texts |= zip(batch, self._written(contexts, json.loads(settings)), strict=True)
                if line is not None:
                    line.update(len(texts))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _scored(self, encoded: Sequence[Encoded], silent: bool) -> list[Any]:
        n = len(different_windows(encoded, self._max_length))
        line = None if silent else ProgressLine("lm-eval", n)
        return self._scorer.score(encoded, *([] if line is None else [line.update]))

    def _written(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Texts after contexts of a batch, of which the last tokens are read that leave room."""
        unknown = sorted(settings.keys() - _KNOWN)
        require(not unknown, "generation_kwargs", unknown, f"must be among {sorted(_KNOWN)}")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        n_new = settings.get("max_gen_toks", self._max_gen_toks)
        room = self._max_length - n_new
        want = f"must be less than max_length={self._max_length}"
        require(0 < n_new < self._max_length, "max_gen_toks", n_new, want)
        tokenizer = self._run.tokenizer
        texts = [GrowingText(tokenizer, stops) for _ in contexts]
        prompts = [[tokenizer.eos_id, *ids][-room:] for ids in tokenizer.encode_batch(contexts)]

        def watch(news: list[list[int]]) -> np.ndarray:
            for text, tokens in zip(texts, news, strict=True):
                text.add(tokens)
            return np.array([text.stop_reason is not None for text in texts])

        generate(
            self._run.model,
            prompts,
            n_new,
            sampling=_sampling(settings),
            allowed_V=tokenizer.may_be_written(self._run.config.model.vocab_size),
            eos_id=tokenizer.eos_id,
            watch=watch,
            task=self._task,
        )
        for text in texts:
            text.close()
        return [text.text for text in texts]


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Settings of sampling; greedy where a task says nothing of it."""
    temperature = settings.get("temperature", 0.0) if settings.get("do_sample", True) else 0.0
    return Sampling(temperature, settings.get("top_k"), settings.get("top_p", 1.0))

"""Speed, cache and draft of a generation, as JSON and as lines."""

from __future__ import annotations

from typing import Any

from dsmoe_jax.model.cache_size import CacheSize
from dsmoe_jax.model.generation import Seconds


def speed(seconds: Seconds, prompt_tokens: int, decoded: int) -> dict[str, float | None]:
    """Tokens and times as JSON; a rate of no token is None."""
    report: dict[str, float | None] = {"compile_seconds": seconds.compile}
    for part, tokens, took in (
        ("prefill", prompt_tokens, seconds.prefill),
        ("decode", decoded, seconds.decode),
    ):
        report[f"{part}_tokens"] = tokens
        report[f"{part}_seconds"] = took
        report[f"{part}_tokens_per_second"] = tokens / took if tokens else None
    return report


def speed_line(speed: dict[str, Any]) -> str:
    """The speed as a line."""
    parts = []
    for part in ("prefill", "decode"):
        rate = speed[f"{part}_tokens_per_second"]
        words = f"{part} {speed[f'{part}_tokens']} tokens in {speed[f'{part}_seconds']:.3g} s"
        parts.append(words if rate is None else f"{words} ({rate:,.0f} tokens/s)")
    return f"speed: {', '.join(parts)}; compiling took {speed['compile_seconds']:.2g} s besides"


def cache_line(size: CacheSize) -> str:
    """The cache as a line."""
    return (
        f"cache: {size.bytes_per_token:,} bytes a token; {size.dense_bytes_per_token:,} in a dense"
        " model of equal activated size with plain multi-head attention (hidden size"
        f" {size.dense_hidden_size:,}; see --help)"
    )


def weights_line(n_bytes: float) -> str:
    """The bytes of the weights as a line."""
    return f"weights: {n_bytes:,.0f} bytes"


def draft_line(draft: dict[str, Any]) -> str:
    """The drafted tokens as a line."""
    shares = [f"{a} of {p}" for a, p in zip(draft["accepted"], draft["proposed"], strict=True)]
    return f"draft: accepted {', '.join(shares)} tokens by module, in {draft['passes']} passes"

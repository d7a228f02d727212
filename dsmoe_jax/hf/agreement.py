"""Agreement of our model with transformers', or of two ways of computing ours, layer by layer.

Logits alone do not say where two models part, and routing may differ long before they do.  So every
layer of ours gets the input that the reference's layer had: what is compared is that layer's own
error.  The logits are those of the whole models.

Shapes: B sequences, S positions, D hidden, T = B*S tokens, K activated experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import MeshConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.hf import loading
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import experts
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel.mesh import make_mesh

RANDOM_TOKENS = 2, 64  # sequences and their length, where no tokens are given


class Choice(NamedTuple):
    """Experts and gates of the tokens of a layer, each (T, K)."""

    ids_TK: np.ndarray
    gates_TK: np.ndarray


class Trace(NamedTuple):
    """A model on a batch.

    Attributes:
      inputs, outputs: of each layer, (B, S, D).
      choices: of each layer; None for a dense one.
      logits_BSV: of the model.
    """

    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    choices: list[Choice | None]
    logits_BSV: np.ndarray


def with_transformers(directory: str, tokens: Sequence[int] | None) -> dict[str, Any]:
    """The agreement of a Hugging Face model as one of ours with transformers'.

    Both compute in float32.

    Args:
      directory: of the model.
      tokens: of one sequence; None: random ones.

    Raises:
      ValueError: if transformers is not installed or has no such architecture; as `open_source`
        does; for a token that the model does not have.
    """
    source = loading.open_source(directory, "--from_hf")
    tokens_BS = _batch(tokens, source.config.vocab_size)
    reference = theirs(source, tokens_BS)
    return compare(loading.load(directory), reference, tokens_BS)


def with_backend(
    open_model: Callable[[str | None], Transformer],
    backend: str,
    tokens: Sequence[int] | None,
) -> dict[str, Any]:
    """The agreement of a model on the ambient mesh with itself on one device.

    Args:
      open_model: `(expert backend) -> model`, on the ambient mesh; None is its own backend.
      backend: of the reference, a name in moe/experts.py.
      tokens: of one sequence; None: random ones.

    Raises:
      ValueError: for an unknown backend, or one that cannot run here.
    """
    experts.check_backend(backend)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        reference_model = open_model(backend)
        tokens_BS = _batch(tokens, reference_model.config.vocab_size)
        reference = trace(reference_model, tokens_BS)
        del reference_model
    return compare(open_model(None), reference, tokens_BS)


def _batch(tokens: Sequence[int] | None, vocab_size: int) -> np.ndarray:
    if tokens is None:
        return np.random.default_rng(0).integers(vocab_size, size=RANDOM_TOKENS, dtype=np.int32)
    for token in tokens:
        require(0 <= token < vocab_size, "--tokens", token, f"must be below {vocab_size}")
    return np.array([tokens], np.int32)


def compare(model: Transformer, reference: Trace, tokens_BS: np.ndarray) -> dict[str, Any]:
    """Errors of a model in each layer, by name.

    Args:
      model: one of ours.
      reference: of the same weights on the same tokens.
      tokens_BS: the tokens.

    Returns:
      `tokens`; `logits_error`, the largest; `logits_scale`, the root of the mean square of the
      reference's; `layers`, for each one `hidden_error`, the largest over the root of the mean
      square of the layer's output, and, None for a dense one, `overlap`, the share of the
      reference's experts that are chosen, and `gate_error`, the largest of an expert chosen by
      both.
    """
    trace = _ours(model, tokens_BS, reference.inputs)
    rows = []
    for number, (a, b) in enumerate(zip(trace.outputs, reference.outputs, strict=True)):
        row = {"layer": number, "overlap": None, "gate_error": None}
        here, there = trace.choices[number], reference.choices[number]
        if here is not None and there is not None:
            row["overlap"], row["gate_error"] = _choice_errors(here, there)
        rows.append(row | {"hidden_error": float(np.abs(a - b).max()) / _scale(b)})
    return {
        "tokens": int(tokens_BS.size),
        "logits_error": float(np.abs(trace.logits_BSV - reference.logits_BSV).max()),
        "logits_scale": _scale(reference.logits_BSV),
        "layers": rows,
    }


def _scale(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _choice_errors(here: Choice, there: Choice) -> tuple[float, float | None]:
    """The share of experts that both have chosen, and the largest difference of their gates."""
    same_TKK = here.ids_TK[:, :, None] == there.ids_TK[:, None, :]
    error_TKK = np.abs(here.gates_TK[:, :, None] - there.gates_TK[:, None, :])
    errors = error_TKK[same_TKK]
    return float(same_TKK.sum() / there.ids_TK.size), float(errors.max()) if errors.size else None


def trace(model: Transformer, tokens_BS: np.ndarray) -> Trace:
    """One of our models on a batch, as a reference for another backend or mesh."""
    return _ours(model, tokens_BS, None)


def _ours(model: Transformer, tokens_BS: np.ndarray, inputs: list[np.ndarray] | None) -> Trace:
    """Our model on a batch; each layer gets the input given, or else its own."""
    x_BSD = model.embedding_VD[...][tokens_BS]
    run = _layer_runner(model, jnp.asarray(tokens_BS))
    found = Trace([], [], [], np.asarray(_logits(model, tokens_BS)))
    for number in range(model.config.num_hidden_layers):
        x_BSD = x_BSD if inputs is None else jnp.asarray(inputs[number])
        found.inputs.append(np.asarray(x_BSD))
        x_BSD, recorded = run(number, x_BSD)
        found.outputs.append(np.asarray(x_BSD))
        found.choices.append(None if recorded is None else _choice(recorded))
    return found


def _logits(model: Transformer, tokens_BS: np.ndarray) -> jax.Array:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens_BS)


def _choice(recorded: RecordedRouting) -> Choice:
    ids, gates = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (recorded.ids, recorded.gates))
    return Choice(ids, gates)


def _layer_runner(
    model: Transformer, tokens_BS: jax.Array
) -> Callable[[int, jax.Array], tuple[jax.Array, RecordedRouting | None]]:
    """Runs a layer by its number; layers alike are compiled once."""

    @jax.jit(static_argnames="graph")
    def run(graph: nnx.GraphDef, params: nnx.State, x_BSD: jax.Array):
        layer = nnx.merge(graph, params)
        x_BSD, report = layer.alone(x_BSD, ModelInputs(tokens_BS))
        return x_BSD, None if report is None else report.recorded

    return lambda number, x_BSD: run(*nnx.split(model.layer(number)), x_BSD)


def theirs(source: loading.Source, tokens_BS: np.ndarray) -> Trace:
    """The model of transformers on a batch, in float32.

    Raises:
      ValueError: if it is not installed, or cannot load the model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            "--check: needs transformers and torch, which are not installed"
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--check: transformers cannot load the model ({reason})") from error
    found = Trace([], [], [None] * len(model.model.layers), np.empty(0))

    def keep_layer(module: Any, arguments: tuple, output: Any) -> None:
        del module
        found.inputs.append(arguments[0].numpy())
        found.outputs.append((output[0] if isinstance(output, tuple) else output).numpy())

    def keep_choice(module: Any, arguments: tuple, output: Any) -> None:
        del module, arguments
        _, gates_TK, ids_TK = output
        found.choices[len(found.inputs)] = Choice(ids_TK.numpy(), gates_TK.numpy())

    for layer in model.model.layers:
        layer.register_forward_hook(keep_layer)
        router = getattr(layer.mlp, "gate", None)
        if router is not None:
            router.register_forward_hook(keep_choice)
    with torch.no_grad():
        logits_BSV = model(torch.tensor(tokens_BS, dtype=torch.int64)).logits.float().numpy()
    return found._replace(logits_BSV=logits_BSV)


def table(result: dict[str, Any]) -> str:
    """The agreement as text, a line a layer."""
    head = f"{'layer':>5}  {'same experts':>12}  {'gate error':>10}  {'hidden error':>12}"
    lines = [head]
    for row in result["layers"]:
        overlap = "-" if row["overlap"] is None else f"{row['overlap']:.4%}"
        gate = "-" if row["gate_error"] is None else f"{row['gate_error']:.1e}"
        lines.append(f"{row['layer']:>5}  {overlap:>12}  {gate:>10}  {row['hidden_error']:>12.1e}")
    logits = f"{result['logits_error']:.1e} apart, at a scale of {result['logits_scale']:.2f}"
    return "\n".join([*lines, f"logits of the whole models: at most {logits}"])

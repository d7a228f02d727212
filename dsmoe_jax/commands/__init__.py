"""The commands: `python -m dsmoe_jax COMMAND [--flags]` or, installed, `dsmoe COMMAND [--flags]`.

A command is a module here with the command's name: flags at the top, `main()`, and its manual as
the docstring.  Only the command that is called is imported: importing JAX takes seconds.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from dsmoe_jax.commands.console import console

COMMANDS = {
    "train": "Train a model, or go on with an interrupted run.",
    "evaluate": "Measure a trained run on held-out text.",
    "status": "Say of any workdir how far it is, how fast, and what went wrong.",
    "generate": "Continue a prompt with a trained model.",
    "count": "Count parameters and FLOPs, beside the paper's figures.",
    "economics": "Say what models cost to train and to serve, dense beside sparse.",
    "plan": "Propose a mesh for a number of chips, with its costs.",
    "aot": "Compile the train step for a TPU slice, without a TPU.",
    "prepare_data": "Prepare a corpus: fetch or read text, train a tokenizer, pack sequences.",
    "convert": "Make a workdir of a Hugging Face model, or the other way round.",
    "surgery": "Change a trained model: a new workdir from another one.",
    "analyse": "Look inside trained models: what each expert serves.",
    "plot_load": "Draw the load of every expert over the training of some runs.",
}


def main() -> None:
    """Runs the command that the command line names; without one, lists them."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name == "help" and arguments:
        name = arguments[0]
        arguments = ["--help"]
    if name in ("help", "--help", "-h"):
        try:
            with console():
                print(_manual())
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    elif name in COMMANDS:
        module = importlib.import_module(f"dsmoe_jax.commands.{name}")
        from dsmoe_jax.commands import command_line  # imports JAX too

        command_line.run(module.main, arguments)
    else:
        print(f"error: {name!r}: {_no_such(name)}", file=sys.stderr)
        sys.exit(2)


def _manual() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "python -m dsmoe_jax COMMAND [--flags]      (installed: dsmoe COMMAND [--flags])",
            "",
            *lines,
            "",
            "COMMAND --help explains one.  Experiments: python -m experiments.table1 --help",
        ]
    )


def _no_such(name: str) -> str:
    if name.startswith("-"):
        return "the command comes before its flags: python -m dsmoe_jax COMMAND [--flags]"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    return f"no such command; {hint}"

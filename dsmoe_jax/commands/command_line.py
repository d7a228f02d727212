"""What all commands share: flags, `--help`, and errors in one line.

A command is a module whose docstring is its manual:

    cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")

    def main() -> None:
        train(cli.config(), _WORKDIR.value)

    if __name__ == "__main__":
        cli.run(main)
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import config_flags

from dsmoe_jax.config import Config, from_config_dict, to_config_dict
from dsmoe_jax.config.mesh import AXES, MeshConfig
from dsmoe_jax.parallel.mesh import make_mesh

FLAGS = flags.FLAGS
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error comes from.")
_CONFIG_HELP = (
    "Config file, with the scale after a colon: configs/dsmoe_2b.py:demo (scales: paper, proxy,"
    " demo, smoke).  Any key is changed by its dotted name:"
    " --config.model.num_hidden_layers=4 --config.train.seed=1"
)


def define_config() -> None:
    """Declares `--config=FILE:ARG` and its `--config.key=value` overrides."""
    config_flags.DEFINE_config_file("config", None, _CONFIG_HELP)


def config() -> Config:
    """The validated config of the command line.

    Raises:
      ValueError: if `--config` is missing or describes an impossible run.
    """
    if FLAGS.config is None:
        raise ValueError("--config: missing; for example --config=configs/dsmoe_2b.py:demo")
    return from_config_dict(FLAGS.config)


def define_mesh() -> None:
    """Declares `--mesh=fsdp=2,expert=4` for commands that load a run."""
    flags.DEFINE_string(
        "mesh",
        "data=1,fsdp=-1",
        "Devices along each axis (data, fsdp, expert, tensor), -1 for the rest; the run may have"
        " been trained on another mesh.",
    )


def mesh() -> Mesh:
    """The mesh of the command line.

    Raises:
      ValueError: if it is none, or does not divide the devices.
    """
    text, sizes = FLAGS.mesh, {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|\d+", size):
            raise ValueError(
                f"--mesh={text}: {item!r} must be AXIS=NUMBER, the axis one of {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    return make_mesh(MeshConfig(**sizes))


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the flags, runs `main` and leaves the process.

    Exit code 0 if `main` returned; 2, with one line on stderr, for a wrong command line and for a
    `ValueError` or `OSError` (both mean bad input; `--traceback` shows where); 130 for Ctrl-C.  Any
    other exception is a bug and keeps its traceback.
    """
    argv = sys.argv
    if any(re.fullmatch(r"--?(h|help|helpshort|helpfull)", arg) for arg in argv[1:]):
        print(_help())
        sys.exit(0)
    try:
        _parse(argv)
        main()
    except (ValueError, OSError) as error:
        if _show_traceback(argv):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _help() -> str:
    main = sys.modules["__main__"]
    own, shared = FLAGS.main_module_help(), FLAGS.module_help(sys.modules[__name__])
    return f"{main.__doc__ or ''}\n{own}\n\n{shared}"


def _show_traceback(argv: Sequence[str]) -> bool:
    return _TRACEBACK.value if FLAGS.is_parsed() else "--traceback" in argv


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parse(argv: Sequence[str]) -> None:
    """Parses `argv`; whatever is wrong with it becomes a `ValueError` of one line."""
    path = _config_path(argv)
    if path is not None and not os.path.isfile(path):
        known = {os.path.basename(file): file for file in glob.glob("configs/*.py")}
        close = difflib.get_close_matches(os.path.basename(path), known, n=1, cutoff=0.7)
        hint = f"did you mean {known[close[0]]}?" if close else "give one of configs/*.py"
        raise ValueError(f"--config={path}: no such file; {hint}")
    if path is None and any(arg.startswith("--config.") for arg in argv):
        raise ValueError("--config: missing; it comes before the keys to change in it")
    try:
        rest = FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        # What get_config raised is at the start of the chain; the rest wraps it in a traceback.
        is_config = "parsing config file" in str(error)
        raise ValueError(_one_line(_root(error) if is_config else error)) from error
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, FLAGS, n=1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        raise ValueError(f"--{error.flagname}: no such flag; {hint}") from error
    except flags.Error as error:
        raise ValueError(_one_line(error)) from error
    except (KeyError, AttributeError) as error:
        line = _unknown_key(argv)
        if "'get_config'" in str(error):
            line = f"--config={path}: has no get_config(arg), so it is not a config file"
        if line is None:  # not about the command line: a bug, to be seen as one
            raise
        raise ValueError(line) from error
    if rest:
        raise ValueError(f"{rest[0]!r}: unexpected argument; options look like --name=value")


def _config_path(argv: Sequence[str]) -> str | None:
    """The file of `--config FILE:ARG` or `--config=FILE:ARG`, if this command has that flag."""
    if "config" not in FLAGS:
        return None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config(?:=(.*))?", arg)
        if match:
            return (match[1] if match[1] is not None else following).partition(":")[0]
    return None


def _root(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _unknown_key(argv: Sequence[str]) -> str | None:
    """The line for the first `--config.a.b=value` that no config has; None if all exist."""
    known = list(flatten_dict(to_config_dict(Config()).to_dict(), keep_empty_nodes=True, sep="."))
    for arg in argv:
        key = arg.lstrip("-").partition("=")[0].removeprefix("config.")
        if not arg.startswith("--config.") or any(f"{k}.".startswith(f"{key}.") for k in known):
            continue
        leaf = key.rpartition(".")[2]
        close = [k for k in known if k.rpartition(".")[2] == leaf]
        close = close or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean --config.{close[0]}?" if close else "see dsmoe_jax/config.py"
        return f"--config.{key}: no such key; {hint}"
    return None

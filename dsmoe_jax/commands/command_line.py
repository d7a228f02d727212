"""Flags, `--help` and errors in one line, shared by all commands.

A command is a module whose docstring is its manual:

    command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")

    def main() -> None:
        train(command_line.config(), _WORKDIR.value)
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import flags
from jax.sharding import Mesh

from dsmoe_jax.commands.console import console
from dsmoe_jax.config import Config, files, from_config_dict, overrides, replace
from dsmoe_jax.config.mesh import parse as parse_mesh
from dsmoe_jax.hardware import virtual_devices
from dsmoe_jax.parallel import hosts
from dsmoe_jax.parallel.mesh import make_mesh

FLAGS = flags.FLAGS
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error comes from.")
_CONFIG_HELP = (
    "Config file, with the scale after a colon: configs/dsmoe_2b.py:demo (scales: paper, proxy,"
    " gpu, demo, smoke).  Any key is changed by its dotted name:"
    " --config.model.num_hidden_layers=4 --config.train.seed=1"
)
# KEY=VALUE of each --config.KEY=VALUE, kept here because absl needs the name of every flag.
_overrides: list[str] = []
# Words of which a command takes one before its flags, with their meaning; the one that was given.
_words: dict[str, str] = {}
_given: list[str] = []
# What arguments without a flag are, and those that were given.
_places: list[str] = []
_given_places: list[str] = []


def define_config() -> None:
    """Declares `--config=FILE:ARG` and its `--config.KEY=VALUE` overrides."""
    flags.DEFINE_string("config", None, _CONFIG_HELP)


def define_configs() -> None:
    """The same for a command of several configs: `--config` may be repeated."""
    flags.DEFINE_multi_string("config", [], f"{_CONFIG_HELP}.  May be repeated.")


def config() -> Config:
    """The validated config of the command line; of several, the first.

    Raises:
      ValueError: if `--config` is missing or describes an impossible run.
    """
    return configs()[0]


def configs() -> list[Config]:
    """The validated configs of the command line, each with the same overrides.

    Raises:
      ValueError: if `--config` is missing or describes an impossible run.
    """
    names = _names()
    if not names:
        raise ValueError("--config: missing; for example --config=configs/dsmoe_2b.py:demo")
    loaded = [from_config_dict(files.load(name)) for name in names]
    try:
        return [replace(one, **dict(map(overrides.parse, _overrides))) for one in loaded]
    except ValueError as error:
        raise ValueError(f"--config.{error}") from error


def _names() -> list[str]:
    """Names that `--config` was given: one, several, or none."""
    given = FLAGS.config
    return [given] if isinstance(given, str) else given or []


def define_words(purposes: Mapping[str, str]) -> None:
    """Declares words of which one comes before the flags: `surgery place --from=...`.

    Args:
      purposes: a line for each word.
    """
    _words.update(purposes)


def word() -> str:
    """The word of the command line.

    Raises:
      ValueError: if there is none, or an unknown one.
    """
    known = ", ".join(_words)
    if not _given:
        raise ValueError(f"needs a word before its flags: {known}; see --help")
    found = _given[0]
    if found not in _words:
        close = difflib.get_close_matches(found, _words, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {known}"
        raise ValueError(f"{found!r}: no such word here; {hint}")
    return found


def define_places(what: str) -> None:
    """Declares that arguments without a flag are taken, and what they are."""
    _places.append(what)


def places() -> list[str]:
    """The arguments without a flag."""
    return list(_given_places)


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
      ValueError: if the flag is not a mesh, or the mesh does not divide the devices.
    """
    return make_mesh(parse_mesh(FLAGS.mesh, f"--mesh={FLAGS.mesh}")[0])


def run(
    main: Callable[[], None], arguments: Sequence[str] | None = None, manual: str | None = None
) -> NoReturn:
    """Parses the flags, runs `main` and exits.

    Exit code 0 if `main` returned; 2, with one line on stderr, for a wrong command line and for a
    `ValueError` or `OSError` (both mean bad input; `--traceback` shows where), unless the error has
    an `exit_code` (75: another process of the run ended, or a bucket does not answer); 130 for
    Ctrl-C; 141 if the reader of its output has left.  Any other exception is a bug and keeps its
    traceback.

    Args:
      main: the command.
      arguments: of the command line; by default those of the process.
      manual: by default the docstring of the module of `main`, whose flags are explained too.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    virtual_devices.allow_waiting()
    asks = any(re.fullmatch(r"--?(h|help|helpshort|helpfull)", arg) for arg in arguments)
    try:
        with console():
            if asks:
                print(_help(main.__module__, manual))
            else:
                parse(arguments)
                main()
    except (ValueError, OSError) as error:
        code = getattr(error, "exit_code", 2)
        hosts.end_soon(code)
        if _TRACEBACK.value if FLAGS.is_parsed() else "--traceback" in arguments:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(OSError):  # the disk that is full may be that of stderr
            print(f"error: {line}", file=sys.stderr, flush=True)
        if isinstance(error, hosts.OnlyHere):
            os._exit(code)
        sys.exit(code)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except Exception:
        hosts.end_soon(1)
        raise
    sys.exit(0)


def _help(module: str, manual: str | None) -> str:
    manual = manual or sys.modules[module].__doc__ or ""
    width = max(map(len, _words), default=0)
    words = "".join(f"  {name:{width}}  {purpose}\n" for name, purpose in _words.items())
    return f"{manual}\n{words}{FLAGS.module_help(module)}\n\n{FLAGS.module_help(__name__)}"


def parse(arguments: Sequence[str]) -> None:
    """Parses the flags of the command that was imported.

    Raises:
      ValueError: in one line, for a flag that does not exist or a value that it cannot have.
    """
    _given.clear()
    if _words and arguments and not arguments[0].startswith("-"):
        _given.append(arguments[0])
        arguments = arguments[1:]
    try:
        arguments = FLAGS.read_flags_from_files(arguments, force_gnu=False)
        rest = FLAGS(["", *_without_overrides(arguments)])[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, FLAGS, n=1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        raise ValueError(f"--{error.flagname}: no such flag; {hint}") from error
    except flags.Error as error:
        raise ValueError(str(error)) from error
    _given_places[:] = rest
    if rest and not _places:
        raise ValueError(f"{rest[0]!r}: unexpected argument; options look like --name=value")
    if _overrides and not _names():
        raise ValueError("--config: missing; the file whose keys --config.KEY=VALUE changes")


def _without_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments except `--config.KEY=VALUE`, which are kept for `config`."""
    if "config" not in FLAGS:
        return list(arguments)
    pattern = re.compile(r"--?config\.")
    _overrides[:] = [pattern.sub("", arg, 1) for arg in arguments if pattern.match(arg)]
    return [arg for arg in arguments if not pattern.match(arg)]

"""Config files: programs with a `get_config(arg)` that returns a `ConfigDict`."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import ml_collections

from dsmoe_jax.config.paths import local_path

REPOSITORY = Path(__file__).resolve().parents[2]  # holds this package and, installed too, configs/
CONFIGS = "configs"


def load(spec: str) -> ml_collections.ConfigDict:
    """Executes a config file: `load("configs/dsmoe_2b.py:demo,shared=2")`.

    It may import its neighbours (`import base`) and what is in configs/ (`from configs import
    base`): its own folder, if that is the name, then the current directory's and the repository's.

    Args:
      spec: a path, relative to the current directory or else to the repository that holds this
        package; after a colon the argument of `get_config`, which is called without one if there
        is no colon.

    Raises:
      ValueError: naming the file, if it does not exist, is not a config file, or fails.
    """
    local_path("config", spec or ".")  # an address has a colon too
    path, colon, arg = spec.partition(":")
    file = _find(path)
    try:
        with _neighbours_of(file):
            get_config = runpy.run_path(str(file)).get("get_config")
            if get_config is None:
                raise ValueError("has no get_config(arg), so it is not a config file")
            config = get_config(arg) if colon else get_config()
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"config={spec}: {kind}{error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise ValueError(f"config={spec}: get_config must return a ConfigDict, not {kind}")
    return config


def _find(path: str) -> Path:
    """The absolute path of a config file."""
    for file in (local_path("config", path or "."), REPOSITORY / path):
        if file.is_file():
            return file
    known = {
        file.name: f"{CONFIGS}/{file.name}"
        for root in (Path.cwd(), REPOSITORY)
        for file in sorted((root / CONFIGS).glob("*.py"))
    }
    close = difflib.get_close_matches(Path(path).name, known, n=1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]}?" if close else f"give one of {CONFIGS}/*.py"
    raise ValueError(f"config={path}: no such file; {hint}")


@contextlib.contextmanager
def _neighbours_of(file: Path) -> Iterator[None]:
    """Lets a config file import its neighbours, and forgets them afterwards.

    The next file may have others of the same names, in another folder.
    """
    folder = file.parent
    roots = [Path.cwd(), REPOSITORY]
    path = list(sys.path)
    modules = dict(sys.modules)
    # The console script, unlike `python -m`, does not have the current directory on `sys.path`.
    sys.path[:0] = map(str, (folder, *roots))
    try:
        _make_package([folder.parent, *roots] if folder.name == CONFIGS else roots)
        yield
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - modules.keys():
            if _directory(sys.modules[name]) == folder:
                del sys.modules[name]
        _forget_package()
        sys.modules.update((name, modules[name]) for name in _of_package(modules))


def _make_package(roots: list[Path]) -> None:
    """Makes `configs` the files of all configs/ in these directories, the first ones first."""
    _forget_package()
    folders = [root / CONFIGS for root in roots if (root / CONFIGS).is_dir()]
    for init in (folder / "__init__.py" for folder in folders):
        if init.is_file():
            spec = importlib.util.spec_from_file_location(
                CONFIGS, init, submodule_search_locations=list(map(str, folders))
            )
            assert spec is not None
            assert spec.loader is not None
            sys.modules[CONFIGS] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[CONFIGS])
            return


def _forget_package() -> None:
    for name in _of_package(sys.modules):
        del sys.modules[name]


def _of_package(modules: Mapping[str, ModuleType]) -> list[str]:
    """The names of the package and of what is in it."""
    return [name for name in modules if name == CONFIGS or name.startswith(f"{CONFIGS}.")]


def _directory(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).parent if isinstance(file, str) else None

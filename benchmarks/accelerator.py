"""The prepared script for the day an accelerator is there: right first, then fast, then table 1.

    python -m benchmarks.accelerator --corpus=gpu.tar.xz
    python -m benchmarks.accelerator --parts=device,backends,layer --minutes=3
    python -m benchmarks.accelerator --scale=smoke --out=DIR          # a test, on any machine

Parts, in this order:
  device    what the machine is, and the FLOP/s of one large product
  backends  every expert backend against the oracle `loop`, values and gradients (agreement.py)
  legs      each product of the experts, forward, gradient of rows and of weights (legs.py)
  layer     the routed layer beside a dense one (moe_layer.py), with the backends that were right
  table1    experiments.v1.table1 at the scale `gpu`, with the backend that was fastest there

Nothing is fetched: --corpus names a packed corpus or its directory (docs/data.md).  Each result is
a line of OUT/accelerator.jsonl as soon as it is there, and so is each failure, after which the rest
goes on.  A later call adds to the file, and takes the backends that were right and fast from it.
What is unfinished when the time is up is left out; a run of table1 is then saved in --runs, and the
same command goes on from it.  OUT/accelerator.md and OUT/table1 have the results to read.

The time is looked at between operations: one long compilation can overrun it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import configs
from benchmarks import agreement, harness, legs, moe_layer
from dsmoe_jax.config import from_config_dict
from dsmoe_jax.hardware.chips import chip_of
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe.experts import BACKENDS
from dsmoe_jax.report import page
from dsmoe_jax.study import runner
from dsmoe_jax.study.cells import Options
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.training.interrupt import Stopped
from experiments.v1 import table1

RESULTS = Path(__file__).parent / "results"
LOG = "accelerator.jsonl"
SUMMARY = "accelerator.md"
RESERVED_S = 20.0  # kept for the report, which loads matplotlib and draws
CHOICE = "model.moe.expert_backend"


class Settings(NamedTuple):
    """Sizes of the parts.

    Attributes:
      product: rows and columns of the matrices whose product is timed.
      shapes: of `agreement.check`, by name.
      legs: of `legs.measure`, by name.
      layers: of `moe_layer`, by name; the first one decides the backend of table 1.
      repeats: rounds of the layer.
      case_s: the longest that a backend may take in one case, seconds.
    """

    product: int
    shapes: dict[str, agreement.Shape]
    legs: dict[str, legs.Shape]
    layers: dict[str, moe_layer.Size]
    repeats: int
    case_s: float


def layer_of(scale: str, tokens: int) -> moe_layer.Size:
    """The MoE layer of DeepSeekMoE at a scale of the configs."""
    model = from_config_dict(configs.load("dsmoe_2b", scale)).model
    moe = model.moe
    return moe_layer.Size(
        tokens,
        model.hidden_size,
        moe.n_routed_experts,
        moe.num_experts_per_tok,
        moe.moe_intermediate_size,
    )


def settings(scale: str) -> Settings:
    """The sizes that belong to a scale of table 1."""
    if scale == "smoke":
        small = agreement.Shape(96, 32, 6, 24)
        one = {"smoke": legs.SIZES["smoke"]}
        return Settings(128, {"small": small}, one, {"smoke": layer_of("smoke", 32)}, 1, 300.0)
    tokens = 16_384  # 1,820 rows an expert: enough to fill the tiles of any kernel
    paper = moe_layer.SIZES["2b"]._replace(tokens=tokens)
    shapes = {
        "small": agreement.Shape(512, 128, 8, 64),
        "2b": agreement.Shape(
            7168, paper.hidden_size, paper.n_routed_experts, paper.moe_intermediate_size
        ),
    }
    both = {name: legs.SIZES[name] for name in ("2b", "16b")}
    return Settings(8192, shapes, both, {scale: layer_of(scale, tokens), "2b": paper}, 9, 60.0)


class TimeUp(Exception):
    """The time of a case, or of the whole, is over."""


class Log:
    """The results, on disk as they come.

    Attributes:
      rows: all of the file, those of earlier calls too.
    """

    def __init__(self, path: Path):
        self._path = path
        text = path.read_text("utf-8") if path.exists() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def write(self, part: str, **fields: Any) -> None:
        """Adds a line and prints it on stderr."""
        row = {"part": part, **fields}
        self.rows.append(row)
        line = json.dumps(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, file=sys.stderr, flush=True)

    def of(self, part: str) -> list[dict[str, Any]]:
        """The rows of a part, without failures."""
        return [row for row in self.rows if row["part"] == part and "error_text" not in row]


class Session:
    """One call of the script: its flags, log and deadline."""

    def __init__(self, flags: argparse.Namespace, out: Path):
        self.flags = flags
        self.out = out
        self.sizes = settings(flags.scale)
        self.log = Log(out / LOG)
        self._deadline = time.monotonic() + 60 * flags.minutes

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self._deadline - time.monotonic()

    def attempt(self, part: str, case: dict[str, Any], run: Callable[[], Any]) -> None:
        """Runs one case within its time; a failure is a row, and the caller goes on."""
        if self.left <= 0:
            self.log.write(part, **case, error_text="not started: the time is up")
            return
        try:
            with time_limit(min(self.left, self.sizes.case_s)):
                run()
        except Exception as error:  # whatever a compiler raises: it is the result
            text = " ".join(str(error).split())[:500]
            self.log.write(part, **case, error_text=f"{type(error).__name__}: {text}")
        finally:
            jax.clear_caches()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeUp` inside when the time is over and Python has its turn again."""

    def stop(signum: int, frame: object) -> None:
        raise TimeUp(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def device(session: Session) -> None:
    """Facts of the machine, then the speed of one dense product in bfloat16."""
    first = jax.devices()[0]
    chip = chip_of(first.device_kind)
    memory = first.memory_stats() or {}
    session.log.write(
        "device",
        **harness.device_header(),
        platform=first.client.platform_version.split("\n")[0],
        memory_gb=memory["bytes_limit"] / 1e9 if "bytes_limit" in memory else None,
        peak_tflops=None if chip is None else chip.peak_flops / 1e12,
        packages=_packages(),
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_"))
        },
    )
    session.attempt("product", {}, lambda: _product(session))


def _packages() -> dict[str, str]:
    """Versions of the libraries that compile or run kernels."""
    wanted = ("jax", "nvidia-", "tokamax", "triton", "libtpu")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name.startswith(wanted)}


def _product(session: Session) -> None:
    size = session.sizes.product
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(jnp.bfloat16)
    multiply = jax.jit(jnp.dot).lower(x, x).compile()
    runs = {"dense": lambda: jax.block_until_ready(multiply(x, x))}
    seconds = min(harness.interleaved(runs, 10, warm_up=2)["dense"])
    session.log.write("product", size=size, tflops=2 * size**3 / seconds / 1e12)


def backends(session: Session) -> None:
    """Every backend and dtype at every shape, the small ones first."""
    for shape in session.sizes.shapes:
        for dtype in agreement.TOLERANCES:
            for name in session.flags.backends:
                case = {"backend": name, "shape": shape, "dtype": dtype}
                session.attempt("backends", case, lambda case=case: _agree(session, case))


def _agree(session: Session, case: dict[str, Any]) -> None:
    shape = session.sizes.shapes[case["shape"]]
    for row in agreement.check(case["backend"], shape, case["dtype"]):
        session.log.write("backends", **case, **row)


def each_leg(session: Session) -> None:
    """The legs of every backend that has a product of its own and was right."""
    wrong = _wrong(session)
    for size, shape in session.sizes.legs.items():
        for name in session.flags.backends:
            case = {"size": size, "backend": name, "dtype": dtype_of_training()}
            if BACKENDS[name].product is None:
                continue
            if name in wrong:
                session.log.write("legs", **case, error_text="not timed: its results are wrong")
                continue

            def measure(case: dict[str, Any] = case, shape: legs.Shape = shape) -> None:
                repeats = session.sizes.repeats
                for row in legs.measure(case["backend"], shape, case["dtype"], repeats):
                    session.log.write("legs", **case, **row)

            session.attempt("legs", case, measure)


def _wrong(session: Session) -> set[str]:
    """The backends that did not agree with the oracle in the dtype of training."""
    return {row["backend"] for row in _of_dtype(session, "backends") if not row["right"]}


def layer(session: Session) -> None:
    """The layer at every size, one backend at a time, so that one that fails fails alone."""
    wrong = _wrong(session)
    for size in session.sizes.layers:
        for name in session.flags.backends:
            case = {"size": size, "backend": name}
            if name in wrong:
                session.log.write("layer", **case, error_text="not timed: its results are wrong")
            elif name != agreement.ORACLE:
                session.attempt("layer", case, lambda case=case: _time_layer(session, case))


def _time_layer(session: Session, case: dict[str, Any]) -> None:
    size = session.sizes.layers[case["size"]]
    cases = moe_layer.build_cases(size, [case["backend"]], False, dtype_of_training(), None)
    for row in moe_layer.measure(size, cases, session.sizes.repeats):
        about = {"size": case["size"], "tokens": size.tokens, "dtype": dtype_of_training()}
        session.log.write("layer", **about, beside=case["backend"], **row)


def dtype_of_training() -> str:
    """The dtype of training on this machine, see `ModelConfig.compute_dtype`."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _of_dtype(session: Session, part: str) -> list[dict[str, Any]]:
    return [row for row in session.log.of(part) if row["dtype"] == dtype_of_training()]


def fastest(session: Session) -> str | None:
    """The backend with the fastest layer of table 1, gradients included; None if none was timed."""
    wanted = next(iter(session.sizes.layers)), "real", "forward+gradients"
    times = {
        row["backend"]: row["ms"]
        for row in _of_dtype(session, "layer")
        if (row["size"], row["routing"], row["pass"]) == wanted and row["backend"] in BACKENDS
    }
    return min(times, key=lambda name: times[name]) if times else None


def table(session: Session) -> None:
    """The arms of table 1 from the last to the first: DeepSeekMoE and GShard are its point."""
    overrides = _overrides(session)
    session.log.write("table1", scale=session.flags.scale, overrides=overrides)
    for arm in reversed(table1.EXPERIMENT.arms):
        case = {"arm": arm.label}
        if session.left <= RESERVED_S:
            session.log.write("table1", **case, error_text="not started: the time is up")
            continue
        start = time.monotonic()
        try:
            with stopped_after(session.left - RESERVED_S):
                comparison = _run(session, overrides, (arm.label,))
        except Stopped:
            session.log.write("table1", **case, error_text="stopped: the time is up; saved")
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            session.log.write("table1", **case, error_text=f"{type(error).__name__}: {text}")
        else:
            seconds = time.monotonic() - start
            for failed in comparison.failed:
                session.log.write("table1", **case, error_text=failed)
            for row in comparison.finished(arm):
                session.log.write("table1", **case, whole_seconds=seconds, **row.measures)
        jax.clear_caches()
    _report(session, overrides)


def _overrides(session: Session) -> dict[str, Any]:
    """Changes of every arm: the corpus, and the backend that was chosen."""
    backend = session.flags.expert_backend or fastest(session)
    corpus = session.flags.corpus
    return ({CHOICE: backend} if backend else {}) | ({"data.corpus": str(corpus)} if corpus else {})


def _run(
    session: Session, overrides: dict[str, Any], arms: tuple[str, ...], report_only: bool = False
) -> Comparison:
    results = str(session.flags.runs)
    options = Options(session.flags.scale, 1, results, arms, overrides, report_only)
    return runner.run(table1.EXPERIMENT, options)


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Stops training as SIGTERM does when the time is over: saved, with `Stopped`."""

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum)

    def time_is_up(signum: int, frame: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    handlers = {signal.SIGTERM: stop, signal.SIGALRM: time_is_up}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _report(session: Session, overrides: dict[str, Any]) -> None:
    """The report of all arms, as far as they are finished, copied to OUT/table1."""
    try:
        comparison = _run(session, overrides, (), report_only=True)
        written = page.write(comparison, Path(session.flags.runs) / f"table1-{session.flags.scale}")
    except Exception as error:
        session.log.write("table1", error_text=f"report: {type(error).__name__}: {error}")
        return
    out = session.out / "table1"
    out.mkdir(exist_ok=True)
    for name in ("report.md", "report.html", "results.jsonl"):
        shutil.copy(written.parent / name, out / name)
    shutil.copytree(written.parent / "pictures", out / "pictures", dirs_exist_ok=True)


PARTS: dict[str, Callable[[Session], None]] = {
    "device": device,
    "backends": backends,
    "legs": each_leg,
    "layer": layer,
    "table1": table,
}

# Part of the log -> its heading and columns in the summary.
_TABLES = {
    "device": ("Machine", ("device", "devices", "cpus", "memory_gb", "peak_tflops", "jax")),
    "product": ("A dense product, bfloat16", ("size", "tflops")),
    "backends": (
        "Expert backends against `loop`",
        ("backend", "shape", "dtype", "loads", "error", "in", "right", "first_call_s"),
    ),
    "legs": (
        "The products of the experts, leg by leg",
        ("size", "backend", "dtype", "product", "leg", "ms", "tflops", "of_dense"),
    ),
    "layer": (
        "The routed layer",
        ("size", "tokens", "beside", "backend", "routing", "pass", "ms", "ratio_to_dense"),
    ),
    "table1": (
        "Table 1",
        ("arm", "validation_loss", "tokens", "maxvio", "seconds", "whole_seconds"),
    ),
}


def summary(log: Log) -> str:
    """The results as Markdown; failures below the tables."""
    blocks = []
    for part, (heading, columns) in _TABLES.items():
        rows = [{c: _cell(row.get(c)) for c in columns} for row in log.of(part)]
        rows = [row for row in rows if row[columns[0]] is not None]
        if rows:
            blocks.append(f"## {heading}\n\n{harness.table(rows)}")
    failures = [row for row in log.rows if "error_text" in row]
    if failures:
        lines = [f"- {_case(row)}: {row['error_text']}" for row in failures]
        blocks.append("## What failed or was left out\n\n" + "\n".join(lines))
    return "\n\n".join(["# Results on this accelerator", *blocks]) + "\n"


def _cell(value: Any) -> Any:
    return ("yes" if value else "NO") if isinstance(value, bool) else value


def _case(row: dict[str, Any]) -> str:
    return ", ".join(str(value) for key, value in row.items() if key != "error_text")


def card() -> str:
    """The device's name as that of a directory."""
    words = "".join(c if c.isalnum() else " " for c in jax.devices()[0].device_kind.lower())
    return "-".join(words.split())


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Command-line flags; wrong ones end the program with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="in all (default 9)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default all)")
    parser.add_argument("--scale", choices=("gpu", "smoke"), default="gpu", help="of all sizes")
    parser.add_argument("--corpus", type=Path, help="packed or prepared (default: the scale's)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/CARD")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="workdirs (default runs)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default all there are")
    parser.add_argument(
        "--expert_backend", choices=list(BACKENDS), help="of table1 (default: the fastest right)"
    )
    flags = parser.parse_args(argv)
    for key, known in (("parts", PARTS), ("backends", BACKENDS)):
        names = getattr(flags, key).split(",")
        for name in names:
            if name not in known:
                parser.error(f"--{key}: {name!r} must be one of {', '.join(known)}")
        setattr(flags, key, names)
    if flags.corpus and not flags.corpus.exists():
        parser.error(f"--corpus={flags.corpus}: no such file or directory")
    return flags


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < np.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return minutes


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    keep_freed_memory()
    out = flags.out or RESULTS / card()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(flags, out)
    for name, part in PARTS.items():
        if name in flags.parts:
            part(session)
            (out / SUMMARY).write_text(summary(session.log), "utf-8")
    print(summary(session.log))
    print(f"{out / LOG}, {out / SUMMARY}")


if __name__ == "__main__":
    main()

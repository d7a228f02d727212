"""Definition of an experiment: arms to compare, sizes that must be equal, and claims.

A new experiment is a module with one literal `Experiment` (see `experiments/v1/table1.py`);
all experiments share the code that runs, checks, resumes and reports them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dsmoe_jax import config as config_lib
from dsmoe_jax.config import Config, files, trees
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import Run
from dsmoe_jax.study import claims as claim_forms
from dsmoe_jax.study import measures, probes
from dsmoe_jax.study.claims import LOSS, Claim
from dsmoe_jax.surgery import complete

_LONGEST_SLUG = 200  # file systems allow 255
NOTHING: Mapping[str, Any] = MappingProxyType({})


def config_of_file(spec: str) -> Config:
    """The config that a file gives.  An experiment asks for the same few again and again.

    Args:
      spec: of the file, see `files.load`; it is executed once in a process.

    Raises:
      ValueError: as `files.load`, and for a config that cannot be.
    """
    return _config_of_file(spec, Path.cwd())


@functools.lru_cache(maxsize=1024)
def _config_of_file(spec: str, directory: Path) -> Config:
    del directory  # where `files.load` looks
    return config_lib.from_config_dict(files.load(spec))


def _product(value: int | float | None, by: float) -> int | float | None:
    """A whole number stays one; others have two digits, as one writes a learning rate.

    None, which stands for all there is, has no multiple.
    """
    if value is None:
        return None
    return round(value * by) if isinstance(value, int) else float(f"{value * by:.2g}")


def _nothing(scale: str) -> Mapping[str, Any]:
    del scale
    return NOTHING


def _slug(label: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
    return "_".join(words)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run of another experiment, of the same scale and seed, or what surgery makes of its model.

    Attributes:
      experiment: that trains it.
      trained: the label of its arm there.
      operations: names in `surgery.OPERATIONS`, each with the options that are not the defaults, in
        order.  What they draw depends on the seed of the run, unless they have one of their own.
      file: in the workdir, that is meant instead of the workdir; "" is the workdir.
    """

    experiment: Experiment = dataclasses.field(hash=False)
    trained: str
    operations: tuple[tuple[str, Mapping[str, Any]], ...] = dataclasses.field(
        default=(), hash=False
    )
    file: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.experiment.arm(self.trained), Arm):
            raise ValueError(
                f"{self.experiment.name}: arm {self.trained!r}: is a probe; must be one that is"
                " trained"
            )
        for name, options in self.operations:
            complete(name, options)

    @property
    def arm(self) -> Arm:
        """The arm that is trained."""
        found = self.experiment.arm(self.trained)
        assert isinstance(found, Arm), "refused at construction"
        return found

    def __str__(self) -> str:
        """Says the same on all machines: "table1/dense, upcycle copies=8 parts=4"."""
        changes = [
            " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            for name, options in self.operations
        ]
        described = ", ".join([f"{self.experiment.name}/{self.arm.slug}", *changes])
        return f"{described}: {self.file}" if self.file else described


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of a comparison, trained for it.

    Attributes:
      label: in tables and pictures.
      config: name of a file in `configs/`.
      options: of that file, as on the command line: "split=2,shared=1".
      paper_loss: validation loss that the paper prints, in nats per token; None if it prints none.
      overrides: dotted config keys to change, for settings that no config file has.
      multiples: dotted keys and the number by which the value of the scale is multiplied; the
        product is rounded to two digits, or to a whole number where the value is one; None stays.
      x: position on the axis `Experiment.x_axis`, if the arms vary one quantity.
      line: name of the line that joins arms with `x` in a picture.
      at_scale: function from a scale to further overrides, for what follows from its numbers.
      from_runs: dotted keys whose values are workdirs of other runs, and these runs: what training
        begins with ("train.start_from"), or learns from.
    """

    label: str
    config: str
    options: str = ""
    paper_loss: float | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    multiples: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    x: float | None = None
    line: str = ""
    at_scale: Callable[[str], Mapping[str, Any]] = dataclasses.field(default=_nothing, hash=False)
    from_runs: Mapping[str, FinishedRun] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def slug(self) -> str:
        """The arm's directory name: "Hash Layer" -> "hash_layer"."""
        return _slug(self.label)

    def config_file(self, scale: str) -> str:
        """The config as on the command line: "configs/dsmoe_2b.py:demo,split=2"."""
        argument = f"{scale},{self.options}" if self.options else scale
        return f"configs/{self.config}.py:{argument}"

    def run_config(self, scale: str, seed: int, overrides: Mapping[str, Any] = NOTHING) -> Config:
        """The config of one run of this arm.

        A key in `from_runs` has the description of the run: where its workdir is says the cell.

        Args:
          scale: of the config files: "smoke", "demo", "gpu", "proxy" or "paper".
          seed: of every random choice; the same seed gives the same data in the same order.
          overrides: dotted config keys to change in every arm.

        Raises:
          ValueError: for an unknown config file, option, scale or key, or an impossible value.
        """
        config = config_of_file(self.config_file(scale))
        runs = {key: str(run) for key, run in self.from_runs.items()}
        own = {**self.overrides, **self.at_scale(scale), **runs}
        changes = {**own, **overrides, "train.seed": seed}
        return self._multiplied(config_lib.replace(config, **changes))

    def _multiplied(self, config: Config) -> Config:
        values = dict(trees.flatten(trees.to_tree(config)))
        products = {key: _product(values[key], by) for key, by in self.multiples.items()}
        return config_lib.replace(config, **products)

    def needs(self, overrides: Mapping[str, Any] = NOTHING) -> dict[str, FinishedRun]:
        """The runs of `from_runs`, without those in whose place overrides name a workdir."""
        return {key: run for key, run in self.from_runs.items() if key not in overrides}

    def passed_on(self, scale: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides that hold for the runs in `from_runs` too: of keys not set by this arm.

        A start model of another size is of no use; other steps of fine-tuning change no start.
        """
        own = {*self.overrides, *self.at_scale(scale), *self.multiples, *self.from_runs}
        return {key: value for key, value in overrides.items() if key not in own}

    def changed_values(self, scale: str, overrides: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
        """The values of the keys in `multiples` at a scale, see `run_config`."""
        values = dict(trees.flatten(trees.to_tree(self.run_config(scale, 0, overrides))))
        return {key: values[key] for key in self.multiples}

    def measured_config(self, config: Config) -> Config:
        """The config of the measured model: that of the run."""
        return config


@dataclasses.dataclass(frozen=True)
class ProbeArm:
    """A trained model measured under an intervention, without further training.

    Attributes:
      label: in tables and pictures.
      experiment: that trained the model.
      trained: the label of the model's arm there.
      intervention: change of the model while it is measured.
      paper_loss: validation loss that the paper prints, in nats per token; None if it prints none.
      x: position on the axis `Experiment.x_axis`; None is a level line.
      line: name of the line that joins arms with `x` in a picture; "" is the trained model's label.
      probe: function that returns the contents of evaluation.json, which the measures read.
      becomes: the config of the model that the probe makes of it, from the model's own; None: the
        probe makes none.
    """

    label: str
    experiment: Experiment = dataclasses.field(hash=False)
    trained: str
    intervention: Intervention = Intervention()
    paper_loss: float | None = None
    x: float | None = None
    line: str = ""
    probe: Callable[[Run, Intervention], dict[str, Any]] = probes.held_out
    becomes: Callable[[Config], Config] | None = None

    def __post_init__(self) -> None:
        self.experiment.arm(self.trained)
        if not self.line:
            object.__setattr__(self, "line", self.trained)

    @property
    def slug(self) -> str:
        """The arm's directory name."""
        return _slug(self.label)

    def run_config(self, scale: str, seed: int, overrides: Mapping[str, Any] = NOTHING) -> Config:
        """The config of the run that trained the model, see `Arm.run_config`."""
        return self.experiment.arm(self.trained).run_config(scale, seed, overrides)

    def measured_config(self, config: Config) -> Config:
        """The config of the model as it is measured, for its activated parameters and FLOPs.

        Of a run in stages it is that of the last one.
        """
        changes: dict[str, Any] = {}
        if self.intervention.num_experts_per_tok is not None:
            changes["model.moe.num_experts_per_tok"] = self.intervention.num_experts_per_tok
        if not self.intervention.shared_experts:
            changes["model.moe.n_shared_experts"] = 0
        measured = config_lib.replace(config_lib.stages_of(config)[-1].config, **changes)
        return measured if self.becomes is None else self.becomes(measured)


AnyArm = Arm | ProbeArm


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Models of growing compute, by which differences are expressed as compute.

    Attributes:
      experiment: that trains them.
      line: their `Arm.line` there.
      reference: the label of the one whose compute is the unit: it has the size and the tokens of
        the compared arms.
    """

    experiment: Experiment = dataclasses.field(hash=False)
    line: str
    reference: str

    def __post_init__(self) -> None:
        if self.reference not in [arm.label for arm in self.arms]:
            raise ValueError(
                f"reference={self.reference!r}: must be an arm of {self.experiment.name} with"
                f" line={self.line!r}"
            )

    @property
    def arms(self) -> tuple[AnyArm, ...]:
        """The arms on the line."""
        return tuple(arm for arm in self.experiment.arms if arm.line == self.line)


class Gain(NamedTuple):
    """Two arms, by label: others keep a share of what the better one gains over the worse one."""

    worse: str
    better: str


@dataclasses.dataclass(frozen=True)
class Equal:
    """A rule: `quantity` differs between arms by at most `tolerance`, relative to the first one."""

    quantity: str
    arms: tuple[str, ...]
    tolerance: float


def same_total(*arms: str) -> tuple[Equal, ...]:
    """Rules that the experts of all arms have the same total size."""
    # All parameters may differ by more: more experts need a larger router.
    return Equal("total", arms, 0.02), Equal("expert_total", arms, 0.001)


def same_activated(*arms: str) -> tuple[Equal, ...]:
    """Rules that all arms do the same work per token."""
    return (
        Equal("activated", arms, 0.04),  # the router alone is 2 % in a tiny model
        Equal("expert_activated", arms, 0.001),
        Equal("flops_per_sequence", arms, 0.001),
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison of models under the same budget, data and random order.

    Attributes:
      module: of the experiment, "experiments.v1.table1"; results go to RESULTS/table1-SCALE.
      title: heading of the report.
      source: paper and table or figure.
      summary: what the paper says, in a sentence or two.
      arms: in the order in which they are shown; pictures of differences start from the first.
      equal: rules about sizes that must agree.
      claims: to be judged, besides the orderings that follow from the arms' `paper_loss`.
      may_differ: config keys (or sections, ending in a dot) in which arms may differ.  All others
        (data, order, seed, steps, batch, learning rate, attention) must be the same.
      measured_may_differ: of tokens, validation_tokens and data_fingerprint those in which finished
        runs may differ.
      measures: columns of the results table; () is every measure that has a column there.
      pictures: names in `report.plots.PLOTS`; () is all that have something to show.
      analyses: names in `report.analyses.ANALYSES`, in the order in which they are shown.
      baseline: whose compute the analysis "effective_compute" counts in; None without one.
      gain: of which the analysis "kept_shares" says what other arms keep; None without one.
      x_axis: label of the axis of the arms' `x`.
      x_scale: of that axis, "linear" or "log".
      panels: title -> names of lines (`Arm.line`), for the picture `panels_over_x`.
      seeds: their default number at each scale.
    """

    module: str
    title: str
    source: str
    summary: str
    arms: tuple[AnyArm, ...]
    equal: tuple[Equal, ...] = ()
    claims: tuple[Claim, ...] = ()
    may_differ: tuple[str, ...] = ("name", "model.moe.")
    measured_may_differ: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    baseline: Baseline | None = None
    gain: Gain | None = None
    x_axis: str = ""
    x_scale: str = "linear"
    panels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    seeds: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"smoke": 1, "demo": 3, "gpu": 1, "proxy": 1, "paper": 1}
    )

    def __post_init__(self) -> None:
        labels = [arm.label for arm in self.arms]
        slugs = [arm.slug for arm in self.arms]
        if not labels or "" in slugs or len(set(slugs)) < len(slugs):
            raise ValueError(f"{self.name}: arms={labels}: labels must differ in letters or digits")
        for label, slug in zip(labels, slugs, strict=True):
            if len(slug.encode()) > _LONGEST_SLUG:
                raise ValueError(
                    f"{self.name}: arm {label!r}: must have at most {_LONGEST_SLUG} bytes of"
                    " letters and digits, which name a directory"
                )
        named = [name for rule in self.equal for name in rule.arms]
        of_claims = [label for claim in self.claims for label in claim.weights]
        for label in (*named, *of_claims, *(self.gain or ())):
            self.arm(label)
        lines = {arm.line for arm in self.arms}
        for title, inside in self.panels.items():
            if not set(inside) <= lines:
                raise ValueError(
                    f"{self.name}: panels[{title!r}]={inside}: must be lines of arms, {lines}"
                )
        measures.check_names(self.name, (*self.measures, *(c.measure for c in self.claims)))
        if "effective_compute" in self.analyses and self.baseline is None:
            raise ValueError(f"{self.name}: baseline=None: effective_compute needs one")
        if "kept_shares" in self.analyses and self.gain is None:
            raise ValueError(f"{self.name}: gain=None: kept_shares needs one")
        sizes = [name for name, measure in measures.MEASURES.items() if measure.from_config]
        for rule in self.equal:
            if rule.quantity not in sizes:
                raise ValueError(f"{self.name}: quantity {rule.quantity!r}: must be one of {sizes}")

    @property
    def name(self) -> str:
        """The last part of `module`."""
        return self.module.rpartition(".")[2]

    @property
    def main_measure(self) -> str:
        """The measure by which arms are ranked: the first column."""
        return self.measures[0] if self.measures else LOSS

    def arm(self, label: str) -> AnyArm:
        """The arm with this label.

        Raises:
          ValueError: if there is none.
        """
        labels = [arm.label for arm in self.arms]
        if label not in labels:
            raise ValueError(f"{self.name}: arm {label!r}: must be one of {labels}")
        return self.arms[labels.index(label)]

    def all_claims(self) -> list[Claim]:
        """The orderings that follow from the paper's losses, then those of `claims`.

        An ordering that is also in `claims` is not repeated.
        """
        ranked = sorted(
            (arm for arm in self.arms if arm.paper_loss is not None),
            key=lambda arm: -(arm.paper_loss or 0.0),
        )
        implied = [
            claim_forms.below(lower.label, higher.label)
            for i, higher in enumerate(ranked)
            for lower in ranked[i + 1 :]
            if lower.paper_loss != higher.paper_loss
        ]
        written = [claim.weights for claim in self.claims if claim.measure == LOSS]
        return [*(claim for claim in implied if claim.weights not in written), *self.claims]

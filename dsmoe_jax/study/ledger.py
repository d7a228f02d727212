"""The ledger: claims that sources make, the evidence on each of them, and the verdicts.

A claim has one or several pieces of evidence, each of one kind:

    FromExperiment    claims of an experiment, judged from its `results.jsonl`
    Computed          a number that follows from configs, formulas or a pure function
    NoExperiment      it could be tested here, and is not yet
    NotTestable       it cannot be tested here, and why

`judge_all` turns them into entries, one a tested statement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsmoe_jax.config import tokens_after
from dsmoe_jax.runs import json_files
from dsmoe_jax.study import fairness, spread, verdicts
from dsmoe_jax.study.claims import LOSS, Claim
from dsmoe_jax.study.experiment import AnyArm, Experiment, ProbeArm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison, Row, load_rows
from dsmoe_jax.study.verdicts import HOLDS, MISSING, REVERSED, UNDECIDED, Finding

UNTESTABLE = "not testable here"
VERDICTS = (HOLDS, REVERSED, UNDECIDED, UNTESTABLE)
# Standings of a claim, besides the verdict that all its entries share.
MIXED = "mixed"  # some of its entries hold, others are reversed
HOLDS_SO_FAR = "holds so far"  # others are not decided, or not testable here
REVERSED_SO_FAR = "reversed so far"
STANDINGS = (HOLDS, HOLDS_SO_FAR, REVERSED, REVERSED_SO_FAR, MIXED, UNDECIDED, UNTESTABLE)

MARGIN, FIGURE = "margin", "figure"

_FOR_TESTS = "smoke"  # a scale of eight steps, which say nothing about a claim
_DIGITS = 6  # significant ones: what a rounding of another processor does not reach


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tested statement: a row of the ledger, without the claim that it belongs to.

    Attributes:
      statement: as tested, "GShard below Switch".
      verdict: one of `VERDICTS`.
      kind: MARGIN: the numbers say by how much an inequality is met, so that those above 0 agree
        with the claim; FIGURE: they are the quantity itself; "" without numbers.
      quantity: of the numbers, with its unit.
      paper: the source's number; None if it prints none.
      ours: our number; None if there is none yet.
      low, high: ends of the 95 % interval of `ours`; None with one seed and for a FIGURE.
      accepted: of a FIGURE, the interval in which the statement holds.
      scale: of the runs; "paper" or None for a FIGURE.
      seeds: their number.
      command: that makes the number; None if there is none.
      why: what a reader must know besides; "" if nothing.
    """

    statement: str
    verdict: str
    kind: str = ""
    quantity: str = ""
    paper: float | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    accepted: tuple[float, float] | None = None
    scale: str | None = None
    seeds: int | None = None
    command: str | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class FromExperiment:
    """Claims of an experiment, judged at every scale that has results but the one for tests.

    Attributes:
      experiment: that makes the results.
      claims: their texts; () is all.
      measure: only claims about this measure; "" is any.
      why: in which smaller form, or in which reading, the source's claim is tested.

    Raises:
      ValueError: for a text that is no claim of the experiment.
    """

    experiment: Experiment
    claims: tuple[str, ...] = ()
    measure: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        known = [claim.text for claim in self.experiment.all_claims() if self._measures(claim)]
        for text in self.claims:
            if text not in known:
                raise ValueError(
                    f"{self.experiment.name}: claim {text!r}: must be one of {known}, or be added"
                    " to the experiment"
                )

    def _measures(self, claim: Claim) -> bool:
        return self.measure in ("", claim.measure)

    def _chooses(self, claim: Claim) -> bool:
        return self._measures(claim) and (not self.claims or claim.text in self.claims)

    def entries(self, results: Path) -> list[Entry]:
        """Entries of every claim, from the largest scale down.

        Raises:
          ValueError: naming the file, if results are damaged or not comparable.
        """
        scales = _scales(self.experiment)
        found = [_read(self.experiment, scale, results) for scale in scales]
        comparisons = [comparison for comparison in found if comparison is not None]
        judged = [self._findings(comparison) for comparison in comparisons]
        notes = [_other_tokens(comparison) for comparison in comparisons]
        nothing = self._findings(_comparison(self.experiment, scales[-1], ()))
        entries = []
        for i, missing in enumerate(nothing):
            known = [
                self._entry(comparison, findings[i], note)
                for comparison, findings, note in zip(comparisons, judged, notes, strict=True)
                if findings[i].verdict != MISSING
            ]
            entries += known or [self._missing(missing, scales[-1], comparisons)]
        return entries

    def _findings(self, comparison: Comparison) -> list[Finding]:
        return [found for found in verdicts.judge(comparison) if self._chooses(found.claim)]

    def _entry(self, comparison: Comparison, finding: Finding, note: str) -> Entry:
        seeds = len(spread.common_seeds(comparison.by_seed(finding.claim.measure)))
        one = "One seed: the verdict is the bare sign of one difference." if seeds == 1 else ""
        assert finding.ours is not None
        width = finding.half_width
        return dataclasses.replace(
            self._blank(finding, comparison.scale),
            verdict=finding.verdict,
            ours=finding.ours,
            low=None if width is None else finding.ours - width,
            high=None if width is None else finding.ours + width,
            scale=comparison.scale,
            seeds=seeds,
            why=_sentences(self.why, one, note),
        )

    def _missing(self, finding: Finding, scale: str, comparisons: list[Comparison]) -> Entry:
        why = "Not run yet: the command trains the models."
        if comparisons:
            why = "The committed results lack a number of some arm; the command makes it."
        return dataclasses.replace(self._blank(finding, scale), why=_sentences(self.why, why))

    def _blank(self, finding: Finding, scale: str) -> Entry:
        """The entry of a claim before it is known how it came out."""
        measure = MEASURES[finding.claim.measure]
        text = finding.claim.text
        return Entry(
            statement=text if finding.claim.measure == LOSS else f"{measure.title}: {text}",
            verdict=UNDECIDED,
            kind=MARGIN,
            quantity=measure.label,
            paper=finding.paper,
            command=_command(self.experiment, scale),
        )


@dataclasses.dataclass(frozen=True)
class Computed:
    """A number that needs no training.

    Attributes:
      statement: that is tested.
      quantity: that is computed, with its unit.
      compute: our number.
      accepted: lowest and highest number with which the statement holds.
      paper: the source's number; None if it prints none.
      command: that shows our number.
      why: what a reader must know besides.
      scale: "paper"; None if the number is of no model's size, as a time on some machine.
    """

    statement: str
    quantity: str
    compute: Callable[[], float]
    accepted: tuple[float, float]
    paper: float | None = None
    command: str = "python -m experiments.ledger"
    why: str = ""
    scale: str | None = "paper"

    def entries(self, results: Path) -> list[Entry]:
        """One entry, whatever the results."""
        del results
        ours = self.compute()
        low, high = self.accepted
        return [
            Entry(
                statement=self.statement,
                verdict=HOLDS if low <= ours <= high else REVERSED,
                kind=FIGURE,
                quantity=self.quantity,
                paper=self.paper,
                ours=ours,
                accepted=self.accepted,
                scale=self.scale,
                command=self.command,
                why=self.why,
            )
        ]


@dataclasses.dataclass(frozen=True)
class NoExperiment:
    """A part of a claim that could be tested here, and is not yet.

    Attributes:
      needs: the experiment that is missing.
      statement: the part of the claim; "" is all of it.
    """

    needs: str
    statement: str = ""

    def entries(self, results: Path) -> list[Entry]:
        """One entry without numbers."""
        del results
        return [Entry(self.statement, UNDECIDED, why=f"No experiment yet: {self.needs}.")]


@dataclasses.dataclass(frozen=True)
class NotTestable:
    """A part of a claim that cannot be tested here.

    Attributes:
      why: the reason, a sentence.
      statement: the part of the claim; "" is all of it.
      command: that measures the nearest thing; None if there is none.
    """

    why: str
    statement: str = ""
    command: str | None = None

    def entries(self, results: Path) -> list[Entry]:
        """One entry without numbers."""
        del results
        return [Entry(self.statement, UNTESTABLE, command=self.command, why=self.why)]


Evidence = FromExperiment | Computed | NoExperiment | NotTestable


@dataclasses.dataclass(frozen=True)
class SourceClaim:
    """A claim of the sources.

    Attributes:
      id: its number.
      source: letters of the documents that make it.
      claim: the text.
      theme: heading under which a page shows it.
      evidence: at least one piece.
    """

    id: int
    source: str
    claim: str
    theme: str
    evidence: tuple[Evidence, ...]


class JudgedClaim(NamedTuple):
    """A claim with its entries, in the order of its evidence."""

    source: SourceClaim
    entries: tuple[Entry, ...]

    @property
    def standing(self) -> str:
        """One of `STANDINGS`."""
        found = {entry.verdict for entry in self.entries}
        if {HOLDS, REVERSED} <= found:
            return MIXED
        verdict = next(verdict for verdict in VERDICTS if verdict in found)
        so_far = {HOLDS: HOLDS_SO_FAR, REVERSED: REVERSED_SO_FAR}
        return verdict if len(found) == 1 else so_far.get(verdict, verdict)


def judge_all(claims: Sequence[SourceClaim], results: Path) -> list[JudgedClaim]:
    """Judges every claim.

    Args:
      claims: in the order in which they are shown.
      results: directory of the folders NAME-SCALE of experiments.

    Raises:
      ValueError: naming the file, if results are damaged or not comparable.
    """
    judged = []
    for claim in claims:
        entries = [entry for piece in claim.evidence for entry in piece.entries(results)]
        judged.append(JudgedClaim(claim, tuple(map(_shortened, entries))))
    return judged


def rows(judged: Sequence[JudgedClaim]) -> list[dict[str, Any]]:
    """Rows of `ledger.jsonl`: the entries with the number, text and source of their claim."""
    return [
        {
            "id": claim.id,
            "claim": claim.claim,
            "source": claim.source,
            "theme": claim.theme,
            **dataclasses.asdict(entry),
        }
        for claim, entries in judged
        for entry in entries
    ]


def to_jsonl(judged: Sequence[JudgedClaim]) -> str:
    """Text of `ledger.jsonl`; a bound that is not there, and a number that is missing, is null."""
    return "".join(json_files.dumps(row) + "\n" for row in rows(judged))


def _read(experiment: Experiment, scale: str, results: Path) -> Comparison | None:
    """The results of an experiment at a scale; None if there are none."""
    path = results / f"{experiment.name}-{scale}" / "results.jsonl"
    if not path.exists():
        return None
    found = load_rows(path)
    for number, row in enumerate(found, start=1):
        for name, value in row.measures.items():
            if name in MEASURES and not isinstance(value, int | float | None):
                raise ValueError(f"{path}: line {number}: {name}={value!r}: must be a number")
    try:
        fairness.check_measured(experiment, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _comparison(experiment, scale, tuple(found))


def _comparison(experiment: Experiment, scale: str, found: tuple[Row, ...]) -> Comparison:
    return Comparison(experiment, scale, experiment.arms, found, {}, _command(experiment, scale))


def _scales(experiment: Experiment) -> list[str]:
    """The scales of an experiment, the largest first."""
    return [scale for scale in reversed(list(experiment.seeds)) if scale != _FOR_TESTS]


def _command(experiment: Experiment, scale: str) -> str:
    """The commands that make an experiment's results; those that train what it needs come first."""
    needed = [module for arm in experiment.arms for module in _needs(arm)]
    modules = dict.fromkeys([*needed, experiment.module])
    return " && ".join(f"python -m {module} --scale={scale}" for module in modules)


def _needs(arm: AnyArm) -> list[str]:
    """Modules of the experiments that train what an arm measures, or begins with."""
    if isinstance(arm, ProbeArm):
        return [*_needs(arm.experiment.arm(arm.trained)), arm.experiment.module]
    runs = arm.from_runs.values()
    return [module for run in runs for module in (*_needs(run.arm), run.experiment.module)]


def _other_tokens(comparison: Comparison) -> str:
    """Sentence about runs that saw another number of tokens than their scale has now."""
    shares = set()
    for arm in comparison.arms:
        config = arm.run_config(comparison.scale, seed=0)
        expected = tokens_after(config, config.train.steps)
        tokens = {row["tokens"] or 0 for row in comparison.finished(arm)}
        shares |= {n / expected for n in tokens}
    if shares <= {1.0}:
        return ""
    low, high = (f"{100 * share:.3g}" for share in (min(shares), max(shares)))
    folder = f"{comparison.experiment.name}-{comparison.scale}"
    return (
        f"Trained on {low if low == high else f'{low} to {high}'} % of the tokens that the scale"
        f" has now: the exact command is in {folder}/report.md."
    )


def _sentences(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _shortened(entry: Entry) -> Entry:
    """The entry with its numbers rounded to the digits that every processor agrees on."""
    numbers = {name: getattr(entry, name) for name in ("paper", "ours", "low", "high")}
    short = {name: None if x is None else _rounded(x) for name, x in numbers.items()}
    accepted = entry.accepted and (_rounded(entry.accepted[0]), _rounded(entry.accepted[1]))
    return dataclasses.replace(entry, accepted=accepted, **short)


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")

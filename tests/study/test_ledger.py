"""The ledger: every kind of evidence on made-up results, and the committed ledger."""

import dataclasses
import json
from pathlib import Path

import pytest
from scipy import stats

from dsmoe_jax.commands import ledger as ledger_command
from dsmoe_jax.study import ledger
from dsmoe_jax.study.claims import below, bounded
from dsmoe_jax.study.experiment import Arm, Experiment, ProbeArm
from dsmoe_jax.study.ledger import (
    HOLDS_SO_FAR,
    MIXED,
    REVERSED_SO_FAR,
    UNTESTABLE,
    VERDICTS,
    Computed,
    FromExperiment,
    NoExperiment,
    NotTestable,
    SourceClaim,
    judge_all,
)
from dsmoe_jax.study.results import Row, write_rows
from dsmoe_jax.study.verdicts import HOLDS, REVERSED, UNDECIDED
from experiments.source_claims import CLAIMS
from tests.tools.forked import run_all

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results"

EXPERIMENT = Experiment(
    "experiments.made.up",
    "",
    "",
    "",
    arms=(Arm("A", "dense_2b", paper_loss=2.5), Arm("B", "hash_2b", paper_loss=2.25)),
    claims=(
        bounded("A", above=1, measure="maxvio"),
        below("B", "A", measure="maxvio", source="table 3"),
    ),
)
TOKENS = 983_040  # of the demo scale


def write(results, losses, scale="demo", tokens=TOKENS, maxvio=None):
    """Results of the experiment: label -> loss of each seed."""
    rows = [
        Row(label, seed, "", "", {"tokens": tokens, "validation_loss": loss, "maxvio": maxvio})
        for label, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    path = results / f"up-{scale}" / "results.jsonl"
    path.parent.mkdir(parents=True)
    write_rows(path, rows)
    return path


def entries(*evidence, results):
    (judged,) = judge_all([SourceClaim(1, "V1", "a claim", "theme", evidence)], results)
    return judged.entries


def entry(results, **choice):
    (found,) = entries(FromExperiment(EXPERIMENT, ("B below A",), **choice), results=results)
    return found


LOSS = {"measure": "validation_loss"}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([3.0, 3.1, 3.3], [2.0, 2.1, 2.2], HOLDS),
        ([2.0, 2.1, 2.2], [3.0, 3.1, 3.3], REVERSED),
        ([3.0, 3.1, 3.3], [3.1, 3.0, 3.3], UNDECIDED),
    ],
)
def test_a_claim_of_an_experiment_has_the_interval_of_the_paired_t_test(tmp_path, a, b, verdict):
    write(tmp_path, {"A": a, "B": b})
    found = entry(tmp_path, **LOSS)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.verdict == verdict
    assert found.paper == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-5)
    assert found.ours == pytest.approx((found.low + found.high) / 2, abs=1e-5)
    assert (found.scale, found.seeds, found.why) == ("demo", 3, "")
    assert found.command == "python -m experiments.made.up --scale=demo"


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    write(tmp_path, {"A": [3.0], "B": [2.9]})
    found = entry(tmp_path, **LOSS)
    assert (found.verdict, found.low, found.high, found.seeds) == (HOLDS, None, None, 1)
    assert "bare sign" in found.why


def test_without_results_a_claim_is_not_decided_and_keeps_the_papers_number(tmp_path):
    found = entry(tmp_path, **LOSS)
    assert (found.verdict, found.ours, found.low, found.high) == (UNDECIDED, None, None, None)
    assert (found.scale, found.seeds) == (None, None)
    assert found.paper == pytest.approx(0.25)
    assert found.why == "Not run yet: the command trains the models."


def test_a_number_that_the_results_lack_is_not_decided(tmp_path):
    write(tmp_path, {"A": [3.0], "B": [2.9]})
    found = entry(tmp_path, measure="maxvio")
    assert (found.verdict, found.ours, found.statement) == (
        UNDECIDED,
        None,
        "MaxVio on held-out text: B below A",
    )
    assert "lack a number" in found.why


def test_commands_of_probes_train_their_models_first(tmp_path):
    probes = tuple(ProbeArm(label, EXPERIMENT, "A") for label in ("one", "two"))
    claims = (below("one", "two"),)
    experiment = dataclasses.replace(
        EXPERIMENT, module="experiments.made.probes", arms=probes, claims=claims
    )
    (found,) = entries(FromExperiment(experiment), results=tmp_path)
    assert found.command == (
        "python -m experiments.made.up --scale=demo"
        " && python -m experiments.made.probes --scale=demo"
    )


def test_every_scale_with_results_is_judged_from_the_largest_down(tmp_path):
    write(tmp_path, {"A": [3.0, 3.1], "B": [2.0, 2.1]}, "demo")
    write(tmp_path, {"A": [2.0], "B": [3.0]}, "proxy", tokens=1)
    write(tmp_path, {"A": [2.0], "B": [3.0]}, "smoke")  # says nothing about a claim
    found = entries(FromExperiment(EXPERIMENT, ("B below A",), **LOSS), results=tmp_path)
    assert [(e.scale, e.verdict) for e in found] == [("proxy", REVERSED), ("demo", HOLDS)]
    assert found[0].command == "python -m experiments.made.up --scale=proxy"


def test_runs_of_another_length_than_the_scales_are_named(tmp_path):
    write(tmp_path, {"A": [3.0, 3.1], "B": [2.0, 2.1]}, tokens=491_520)
    assert entry(tmp_path, **LOSS).why == (
        "Trained on 50 % of the tokens that the scale has now: the exact command is in"
        " up-demo/report.md."
    )


def test_all_claims_or_those_about_a_measure_are_chosen(tmp_path):
    write(tmp_path, {"A": [3.0], "B": [2.9]}, maxvio=2.0)
    everything = entries(FromExperiment(EXPERIMENT), results=tmp_path)
    assert [(e.statement, e.verdict, e.ours) for e in everything] == [
        ("B below A", HOLDS, 0.1),
        ("MaxVio on held-out text: A above 1", HOLDS, 1.0),
        ("MaxVio on held-out text: B below A", UNDECIDED, 0.0),
    ]
    some = entries(FromExperiment(EXPERIMENT, measure="maxvio"), results=tmp_path)
    assert some == everything[1:]


def test_an_unknown_claim_is_refused():
    with pytest.raises(ValueError, match=r"up: claim 'C below A': must be one of \['B below A', "):
        FromExperiment(EXPERIMENT, ("C below A",))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:40], r"line 1 is not a row of results: not JSON"),
        (lambda text: text.replace('"seed"', '"sed"'), r"line 1 is not a row of results"),
        (lambda text: text.replace("3.0", '"3"'), r"line 1: validation_loss='3': must be a number"),
        (lambda text: text.replace(f"{TOKENS}", "1", 1), r"up: unfair: tokens is 1 in A, seed 0"),
    ],
)
def test_damaged_results_are_named_in_one_line(tmp_path, damage, says):
    path = write(tmp_path, {"A": [3.0], "B": [2.9]})
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=says) as error:
        entry(tmp_path, **LOSS)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, HOLDS), (1.5, HOLDS), (2.0, HOLDS), (0.999, REVERSED)]
)
def test_a_computed_number_holds_within_its_interval(tmp_path, ours, verdict):
    evidence = Computed("it is", "experts", lambda: ours, (1.0, 2.0), paper=1.5)
    (found,) = entries(evidence, results=tmp_path)
    assert (found.verdict, found.ours, found.paper) == (verdict, ours, 1.5)
    assert (found.low, found.high, found.accepted) == (None, None, (1.0, 2.0))
    assert found.scale == "paper"


def test_evidence_without_numbers_says_why(tmp_path):
    needs = NoExperiment("merging experts", "a part")
    cannot = NotTestable("There is no source.")
    no_experiment, untestable = entries(needs, cannot, results=tmp_path)
    assert (no_experiment.verdict, untestable.verdict) == (UNDECIDED, UNTESTABLE)
    assert no_experiment.why == "No experiment yet: merging experts."
    assert (untestable.why, untestable.ours) == ("There is no source.", None)


@pytest.mark.parametrize(
    ("verdicts", "standing"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNDECIDED], HOLDS_SO_FAR),
        ([REVERSED], REVERSED),
        ([UNTESTABLE, REVERSED], REVERSED_SO_FAR),
        ([REVERSED, UNDECIDED, HOLDS], MIXED),
        ([UNTESTABLE, UNDECIDED], UNDECIDED),
        ([UNTESTABLE], UNTESTABLE),
    ],
)
def test_the_standing_of_a_claim_is_that_of_its_decided_entries(verdicts, standing):
    rows = tuple(ledger.Entry("", verdict) for verdict in verdicts)
    assert ledger.JudgedClaim(CLAIMS[0], rows).standing == standing


# The committed ledger


@pytest.fixture(scope="module")
def rows():
    """The rows that the committed results give."""
    return [json.loads(line) for line in ledger.to_jsonl(judge_all(CLAIMS, RESULTS)).splitlines()]


def test_every_claim_is_there_in_order_with_a_verdict(rows):
    assert [claim.id for claim in CLAIMS] == list(range(1, 48))
    assert list(dict.fromkeys(row["id"] for row in rows)) == list(range(1, 48))
    for row in rows:
        assert row["verdict"] in VERDICTS
        assert row["claim"]
        assert row["source"]
        assert row["command"] or row["why"]
        assert row["why"] or row["verdict"] != UNTESTABLE
        assert row["ours"] is not None or row["verdict"] in (UNDECIDED, UNTESTABLE)
    assert len([row for row in rows if row["id"] == 8]) >= 10


def test_what_contradicts_its_source_is_reversed(rows):
    found = {(row["id"], row["statement"]): row for row in rows}
    assert found[4, "8 of 256 are 2 %"]["verdict"] == REVERSED
    assert found[39, "V3 as printed: 258 experts"]["ours"] == 257
    irreproducible = [row for row in rows if row["id"] == 47 and row["verdict"] == REVERSED]
    assert [row["statement"] for row in irreproducible] == [
        "dsmoe_142b_half: activated parameters 12.2B"
    ]
    assert "add up to 13.6B" in irreproducible[0]["why"]


def test_the_committed_ledger_is_what_the_committed_results_give(rows):
    """If not: python -m experiments.ledger."""
    committed = [json.loads(line) for line in (RESULTS / "ledger.jsonl").read_text().splitlines()]
    assert [row["statement"] for row in committed] == [row["statement"] for row in rows]
    for old, new in zip(committed, rows, strict=True):
        for key in old.keys() | new.keys():
            expected = new[key]
            if isinstance(expected, float):  # another processor may round the sixth digit otherwise
                expected = pytest.approx(expected, rel=2e-5)
            assert old[key] == expected, (key, old)


def test_a_wrong_flag_is_answered_in_one_line():
    (done,) = run_all([["--reslts=x"]], module="experiments.ledger")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --reslts: no such flag; did you mean --results?\n"


def test_results_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--results=.*none: no such directory; give that of"):
        ledger_command.write(CLAIMS, {}, f"{tmp_path}/none", None)


def test_the_files_go_to_out(tmp_path, capsys):
    claims = [SourceClaim(1, "A", "a claim", "theme", (NoExperiment("one"),))]
    (tmp_path / "results").mkdir()
    ledger_command.write(claims, {"A": "a blog"}, f"{tmp_path}/results", f"{tmp_path}/out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ledger.html",
        "ledger.jsonl",
        "ledger.md",
    ]
    assert not list((tmp_path / "results").iterdir())
    said = capsys.readouterr().out
    assert said.startswith("1 claims, tested as 1 statements")
    assert f"{tmp_path}/out/ledger.html" in said

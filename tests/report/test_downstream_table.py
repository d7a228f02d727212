"""The table of question sets: which columns and rows there are, and what its cells say."""

from dsmoe_jax.report.downstream_table import downstream_table, downstream_text


def number(value, half):
    return {"value": value, "low": value - half, "high": value + half}


CHOSEN = {
    "shots": 5,
    "questions": 1838,
    "cut": 0,
    "chance": 0.5,
    "accuracy": number(0.6, 0.021),
    "accuracy_per_character": number(0.5, 0.02),
    "accuracy_per_byte": number(0.5, 0.02),
    "accuracy_pmi": None,
    "greedy": None,
    "bits_per_byte": number(1.25, 0.0312),
}
WRITTEN = {
    **dict.fromkeys(CHOSEN),
    "shots": 0,
    "questions": 1,
    "cut": 1,
    "greedy": number(0.25, 0.1),
    "bits_per_byte": {"value": 2.0, "low": None, "high": None},
}


def test_a_run():
    tasks = {"piqa": CHOSEN, "squad": WRITTEN}
    text = downstream_text({"dsmoe": {"step": 9, "max_length": 64, "tasks": tasks}})
    table = """\
task   shots  questions  chance %  accuracy %  per character %  per byte %    greedy %     bits/byte
-----  -----  ---------  --------  ----------  ---------------  ----------  ----------  ------------
piqa       5      1,838      50.0   60.0 ±2.1        50.0 ±2.0   50.0 ±2.0           –  1.250 ±0.031
squad      0          1         –           –                –           –  25.0 ±10.0         2.000
"""
    assert text.startswith(table)
    assert text.endswith(
        "dsmoe reads 64 tokens at once: of longer questions only the end (1 of squad)"
    )


def test_runs_side_by_side():
    """A task's runs stand below each other."""
    run = {"step": 9, "max_length": 64, "tasks": {"piqa": CHOSEN, "csqa": CHOSEN}}
    table = downstream_table({"a": run, "b": run})
    assert [row[:2] for row in table.rows] == [
        ["piqa", "a"], ["piqa", "b"], ["csqa", "a"], ["csqa", "b"],
    ]  # fmt: skip
    assert "greedy %" not in table.head

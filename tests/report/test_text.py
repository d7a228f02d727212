"""Held-out results as text."""

from dsmoe_jax.report.text import held_out_text

ROW = {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 1000}


def test_the_table_names_the_batch_where_it_matters():
    result = {"step": 3, **ROW, "domains": {"code": ROW}}
    plain = held_out_text(result).splitlines()
    assert [line.split() for line in plain] == [
        ["domain", "tokens", "nats/token", "bits/byte"],
        ["code", "1,000", "2.0000", "1.0000"],
        ["all", "1,000", "2.0000", "1.0000"],
    ]
    *same, last = held_out_text({**result, "batch_size": 16}).splitlines()
    assert same == plain
    assert last.startswith("in batches of 16 sequences: ")
    assert "another --batch_size gives another loss" in last

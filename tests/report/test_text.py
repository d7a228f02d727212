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


def test_specialisation_is_a_line_and_not_a_table_of_experts():
    result = {**ROW, "domains": {"code": ROW}, "load_by_domain": {"code": [[3, 1], [2, 2]]}}
    *_, last = held_out_text({**result, "domain_specialisation": [0.25, 0.0312]}).splitlines()
    assert last.startswith("domain specialisation by layer: 0.250 0.031 (0: all domains")
    *_, last = held_out_text(result).splitlines()
    assert last == "domain specialisation: takes two domains of 500 tokens or more"

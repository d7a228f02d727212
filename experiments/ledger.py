"""Every claim of the sources, tested: writes the ledger from the results of the experiments.

    python -m experiments.ledger
    python -m experiments.ledger --results=runs --out=my_ledger

Trains nothing.  It reads the `results.jsonl` of every experiment that a claim names, at every scale
but smoke, computes what follows from configs and formulas, and writes

    ledger.md, ledger.html    the same page, for a code-hosting site and for a browser
    ledger.jsonl              one row a tested statement

The claims and their evidence are the literal in experiments/source_claims.py.
"""

from dsmoe_jax.commands import ledger
from experiments.source_claims import CLAIMS, SOURCES

if __name__ == "__main__":
    ledger.main(CLAIMS, SOURCES)

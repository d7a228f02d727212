"""The cap that fills a byte budget: against trying every one, and on real builds."""

import json
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from dsmoe_jax.data import packed
from dsmoe_jax.data.fitting import fit, largest_cap
from dsmoe_jax.data.prepare import prepare

SIZES = {"vocab_size": 270, "sequence_length": 32}


@hypothesis.settings(max_examples=200, derandomize=True)
@hypothesis.given(
    domains=st.lists(st.integers(1, 5_000), min_size=1, max_size=6),
    budget=st.integers(1, 12_000),
    bend=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_no_larger_cap_fits(domains: list[int], budget: int, bend: float):
    """Sizes bend up, down or not at all; halving or not, the answer is that of trying them all."""
    tried = []

    def size_of(cap: int) -> int:
        tried.append(cap)
        return round(sum(min(size, cap) for size in domains) ** bend)

    longest = max(domains)
    caps = [longest, *range(100, longest, 100)]
    fitting_caps = [cap for cap in caps if size_of(cap) <= budget]
    tried.clear()
    if not fitting_caps:
        with pytest.raises(ValueError, match=r"too small, with .* the corpus has"):
            largest_cap(size_of, budget, longest, unit=100)
        return
    assert largest_cap(size_of, budget, longest, unit=100) == max(fitting_caps)
    assert len(tried) <= 14  # of up to 50 caps, each of which is a build


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two domains of random numbers, one three times as long as the other."""
    chance = random.Random(0)
    rows = [
        {"domain": domain, "text": " ".join(str(chance.randrange(9999)) for _ in range(60))}
        for domain, count in (("long", 90), ("short", 30))
        for i in range(count)
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_corpus_fills_its_budget(text: Path, tmp_path: Path):
    def size_of(cap: int | None) -> int:
        made = prepare(str(text), tmp_path / str(cap), max_bytes_per_domain=cap, **SIZES)
        return packed.packed_bytes(made)

    whole = size_of(None)
    found = []
    for budget in (whole // 2, whole * 3 // 4):
        cap = fit(str(text), budget, 2000, **SIZES)
        assert size_of(cap) <= budget < size_of(cap + 2000)
        found.append(cap)
    assert found == sorted(set(found))
    made = prepare(str(text), tmp_path / "None", **SIZES)
    longest = max(sum(domain["bytes"].values()) for domain in made.manifest["domains"])
    # The manifest names the cap, which moves the size a little.
    assert fit(str(text), whole + 1000, **SIZES) == longest
    with pytest.raises(ValueError, match=r"budget 10 bytes: too small"):
        fit(str(text), 10, **SIZES)


def test_the_command_packs_what_fits(text: Path, tmp_path: Path):
    command = [sys.executable, "-m", "dsmoe_jax", "prepare_data", f"--out={tmp_path / 'out'}"]
    command += [f"--corpus={text}", "--vocab_size=270", "--sequence_length=32"]
    command += [f"--pack={tmp_path / 'text.tar.xz'}", "--max_packed_mb=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size = (tmp_path / "text.tar.xz").stat().st_size
    assert f"{size / 1e6:.2f} MB in {tmp_path / 'text.tar.xz'}" in result.stdout
    back = packed.unpack(tmp_path / "text.tar.xz", tmp_path / "back")
    assert back.manifest["request"]["max_bytes_per_domain"] is not None
    result = subprocess.run(
        [*command, "--max_bytes_per_domain=5"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "text.tar.xz: exists already" in result.stderr

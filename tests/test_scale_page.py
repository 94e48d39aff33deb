"""docs/scale.md: its table is what `python -m bench.scale` prints; its sums are right."""

import pytest

from autodeco_fast.training.scan_store import token_bytes
from bench import scale
from tests.commands import ROOT

PAGE = (ROOT / "docs/scale.md").read_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_the_one_that_is_printed(capsys):
    scale.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    printed = [cells(line) for line in lines if not line.startswith("| ---")]
    begin = next(line for line in PAGE.splitlines() if cells(line) == printed[0])
    after = PAGE[PAGE.index(begin) :].splitlines()[2 : 1 + len(printed)]
    assert [cells(line) for line in after] == printed[1:]


def test_flops_are_counted():
    """An 8B model has 7.0 billion weights beside its two embeddings: twice as many FLOPs a token,
    and some for attention."""
    model = scale.MODELS[1]
    assert model.flops() == pytest.approx(2 * 6.98e9, rel=0.03)
    assert scale.tokens_a_second(model, 1.0) < scale.matrix_rate() / model.flops()


def test_the_numbers_of_the_text():
    assert f"{scale.matrix_rate() / 1e12:.0f} TFLOP/s" in PAGE
    assert f"At {token_bytes(4096):,} bytes a token" in PAGE
    text = " ".join(PAGE.split())
    assert f"would be {1e12 * token_bytes(4096) / 1e15:.1f} PB" in text
    kept = round(2e12 / token_bytes(4096) / 1e6, -1)
    assert f"`--max-bytes 2T` keeps a random {kept:.0f} million of its tokens" in text

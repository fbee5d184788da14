"""`python -m kernels.bench`: shares of the ceilings, and a file that grows with what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.bench import cli
from kernels.bench.row import Ceilings, Row, line


def test_shares_of_the_ceilings() -> None:
    ceilings = Ceilings(read=4.0, matrix=800.0)
    read = Row("A16W4", "qkv M=1", 10.0, 2e-3, 8.0, tb_per_s=3.0, others={"cuBLAS bf16": 20.0})
    assert read.shares(ceilings) == {"of_read": 0.75}
    shown = line(read, ceilings)
    assert "(partials 8.00)  3.00 TB/s, 75% of read" in shown and "matrix" not in shown
    many = Row("A8W8", "8192^3", 900.0, 2e-3, tera_ops=1200.0)
    assert "1200 Tera-op/s, 150% of matrix" in line(many, ceilings) and "read" not in line(many, ceilings)
    assert Row("layer", "int4 M=1", 50.0, 0.0).shares(ceilings) == {}, "what was not measured is absent"


def test_a_run_that_breaks_off_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks_off() -> Iterator[Row]:
        yield Row("second", "a", 2.0, 0.0)
        raise AssertionError("wrong")

    monkeypatch.setattr(cli, "OPS", {"first": lambda: iter([Row("first", "a", 1.0, 0.0, tb_per_s=2.0)]),
                                     "second": breaks_off})  # fmt: skip
    monkeypatch.setattr(cli, "read_bandwidth", lambda: 4.0)
    monkeypatch.setattr(cli, "matmul_rate", lambda: 800.0)
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["bench", "--op", "first", "second", "--json", str(file)])
    with pytest.raises(AssertionError, match="wrong"):
        cli.main()
    held = json.loads(file.read_text())
    assert [(row["op"], row["of_read"]) for row in held["rows"]] == [("first", 0.5)]
    assert (held["read_tb_per_s"], held["matmul_tflops"]) == (4.0, 800.0)
    assert "2.00 TB/s, 50% of read" in capsys.readouterr().out

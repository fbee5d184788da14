"""The table of what was asked of the kernels: README's is that of the committed run, and a slower run says "no"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kernels
from kernels.bench import bars

HERE = Path(kernels.__file__).parent
RECORD = json.loads((HERE / "results" / "NVIDIA_H200.json").read_text())


def test_the_readme_holds_the_table_of_the_committed_run() -> None:
    assert bars.table(RECORD) in (HERE / "README.md").read_text()


@pytest.mark.parametrize(
    ("op", "problem", "changed", "line", "says"),
    [
        ("A16W4", "down M=16", {"us": 14.0, "partials_us": 13.0, "others": {}}, "| A16W4, M=16 ", "no, by 7.7%"),
        (
            "A16W4", "down M=16", {"partials_us": 11.0, "others": {"ours, tiles chosen alone": 13.0}}, "| A16W4, M=16 ",
            "| yes |",
        ),
        ("A8W8", "8192^3", {"tera_ops": 1000.0}, "| A8W8 int8", "no, by 10.0%"),
        ("decode attention", "64 x 2048 bf16", {"us": 143.0}, "| decode attention 64 x 2048", "no, by 10.0%"),
        ("A16W4", "o M=2048", {"us": 112.0, "others": {"cuBLAS bf16": 100.0}}, "| A16W4, M=2048", "| yes |"),
        ("A16W4", "o M=2048", {"us": 123.2, "others": {"cuBLAS bf16": 100.0}}, "| A16W4, M=2048", "no, by 10.0%"),
    ],
)  # fmt: skip
def test_a_slower_run_says_by_how_much(op: str, problem: str, changed: dict[str, object], line: str, says: str) -> None:
    rows = [row | changed if (row["op"], row["problem"]) == (op, problem) else row for row in RECORD["rows"]]
    (found,) = (text for text in bars.table({"rows": rows}).splitlines() if text.startswith(line))
    assert says in found


def test_a_run_that_left_an_operation_out_has_no_table() -> None:
    with pytest.raises(KeyError, match="A8W8"):
        bars.table({"rows": [row for row in RECORD["rows"] if row["op"] != "A8W8"]})

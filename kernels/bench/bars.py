"""python -m kernels.bench.bars [FILE]: what was asked of the kernels, and what a run of `python -m kernels.bench --json
FILE` reached. The table of kernels/README.md is what this prints.

At few rows a product runs by two sets of tiles, those that a search found fastest alone and those that layers use; what
it takes alone is the shorter time, and the second one stands beside it. Partial sums are what it leaves where a
consumer sums them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tuning import TUNED

NAMES = ("qkv", "o", "gate_up", "down")
ONE_ROW = (6.8, 5.2, 19.5, 10.5)
FEW = {
    "A16W4, M=1": ("A16W4", 1, ONE_ROW),
    "A16W4, M=16": ("A16W4", 16, tuple(1.15 * us for us in ONE_ROW)),
    "bf16, M=1": ("A16W16", 1, (13.5, 9.5, 56.0, 30.0)),
}
"""Microseconds of the products in NAMES."""
AT_PAR = 1.02
"""Up to so many times as slow is "at par": repeats of a run differ by as much."""


@dataclass(frozen=True)
class Bar:
    """One line of the table. share: measured over allowed, the worst of the figures; up to 1 is met."""

    what: str
    asked: str
    measured: str
    share: float

    def line(self) -> str:
        met = "yes" if self.share <= 1 else f"no, by {self.share - 1:.1%}"
        return f"| {self.what} | {self.asked} | {self.measured} | {met} |"


Rows = dict[tuple[str, str], dict[str, Any]]


def table(record: dict[str, Any]) -> str:
    """The table of a run, as Markdown. KeyError: the run left an operation out."""
    rows = {(row["op"], row["problem"]): row for row in record["rows"]}
    head = ["| what (7B shapes: qkv / o / gate_up / down) | bar | measured | met |", "|---|---|---|---|"]
    return "\n".join(head + [bar.line() for bar in bars(rows)])


def bars(rows: Rows) -> Iterator[Bar]:
    for what, (op, m, asked) in FEW.items():
        alone = [_alone(rows[op, f"{name} M={m}"]) for name in NAMES]
        used = [rows[op, f"{name} M={m}"]["partials_us"] for name in NAMES]
        yield Bar(what, _list(asked), f"{_list(alone)}; by tiles of layers {_list(used)}", _worst(alone, asked))
    for m, most in ((64, None), (256, 1.15), (2048, 1.12)):
        yield _against_cublas(rows, m, most)
    both = [_alone(rows["A16W8", f"gate_up M={m}"]) for m in (1, 16)]
    yield Bar("A16W8, gate_up, M=1 / 16", "33 / 35", _list(both), _worst(both, (33, 35)))
    rate = rows["A8W8", "8192^3"]["tera_ops"]
    yield Bar("A8W8 int8, 8192^3, scaled", "1,100 TOP/s", f"{rate:,.0f} TOP/s", 1100 / rate)
    (slope,) = (row for (op, problem), row in rows.items() if problem.startswith("slope"))
    yield Bar("A16W4, M=1, slope of two sizes", "3.7 TB/s", f"{slope['tb_per_s']:.2f} TB/s", 3.7 / slope["tb_per_s"])
    yield from _attention(rows)


def _against_cublas(rows: Rows, m: int, most: float | None) -> Bar:
    held = [rows["A16W4", f"{name} M={m}"] for name in NAMES]
    ours = [min(row["us"], row["partials_us"]) if m == 64 else row["us"] for row in held]
    theirs = [row["others"]["cuBLAS bf16"] for row in held]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Bar(
        f"A16W4, M={m}, against cuBLAS bf16 {_list(theirs)}", "faster" if most is None else f"<= {most}x",
        f"{_list(ours)} = {' / '.join(f'{ratio:.2f}' for ratio in ratios)}x", max(ratios) / (most or 1),
    )  # fmt: skip


def _attention(rows: Rows) -> Iterator[Bar]:
    def us(shape: str, *formats: str) -> list[float]:
        return [rows["decode attention", f"{shape} {format}"]["us"] for format in formats]

    large = us("64 x 2048", "bf16", "int8", "fp8", "int4")
    asked = (130, 75, 78, 50)
    what = "decode attention 64 x 2048: bf16 / int8 / fp8 / int4"
    yield Bar(what, " / ".join(map(str, asked)), _list(large), _worst(large, asked))
    for shape, par in (("1 x 8192", 14.6), ("16 x 2048", 37.7)):
        plain, int8, int4 = us(shape, "bf16", "int8", "int4")
        yield Bar(
            f"decode attention {shape}: bf16 / int8 / int4", f"{par} at par / faster / faster still",
            _list((plain, int8, int4)), max(plain / par / AT_PAR, int8 / plain, int4 / int8),
        )  # fmt: skip
    prefill = rows["prefill attention", "512 after 4096 int8"]
    speed = prefill["others"]["SDPA bf16"] / prefill["us"]
    yield Bar("prefill, 512 tokens behind 4,096 in int8", "0.8x SDPA bf16", f"{speed:.2f}x", 0.8 / speed)


def _alone(row: dict[str, Any]) -> float:
    return float(min(row["others"].get("ours, tiles chosen alone", row["partials_us"]), row["partials_us"]))


def _worst(measured: list[float], asked: tuple[float, ...]) -> float:
    return max(a / b for a, b in zip(measured, asked, strict=True))


def _list(values: list[float] | tuple[float, ...]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.bars", description=__doc__)
    committed = TUNED.parent / "results" / "NVIDIA_H200.json"
    parser.add_argument("file", nargs="?", type=Path, default=committed, help="the committed run, unless given")
    print(table(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()

"""The search by the time of whole layers: what it tries, what it compiles ahead, and what it keeps."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from kernels import candidates, tune_layer
from kernels.measuring.problems import SHAPES
from kernels.tuning import HopperConfig, SkinnyConfig
from tests.unit.kernels.test_tune import PTXAS


def test_a_layer_tries_the_fastest_the_busiest_and_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held, fast, busy, slow = (
        asdict(SkinnyConfig(8, bn, splits, warps, 3))
        for bn, splits, warps in ((64, 2, 1), (128, 2, 2), (32, 8, 1), (256, 1, 4))
    )
    problem = ("planes", 1, 4096, 4096)
    records = [
        {"op": "planes", "m": 1, "n": 4096, "k": 4096, "us": us, "config": config}
        for us, config in ((5.0, fast), (6.0, slow), (7.0, busy))
    ]
    records.append({"op": "planes", "m": 16, "n": 4096, "k": 4096, "us": 1.0, "config": slow})  # another problem
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": {problem: held} if part == "entries" else {})
    found = tune_layer.candidates(records, problem, most=2)
    assert found[0] == held and [c for c in found[1:] if c in (fast, slow, busy)] == [fast, slow, busy]
    near = [c for c in found[1:] if c not in (fast, slow, busy)]
    assert near and all(sum(c[name] != held[name] for name in held) == 1 for c in near)
    assert held | {"late": True} in near and all(SkinnyConfig(**c) for c in near)
    eight = ("planes", 8, 4096, 4096)  # nothing was timed at 8 rows: those of fewer are tried
    assert tune_layer.candidates(records, eight, most=2) == [held, fast, slow, busy]


def test_gated_products_are_tried_whole_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = asdict(SkinnyConfig(8, 128, 2, 2, 4))
    monkeypatch.setattr(
        tune_layer, "table", lambda part="entries": {("planes", 1, 28672, 4096): plain} if part == "entries" else {}
    )
    problem = tune_layer.problem_of("gated", "int4", 1)
    assert problem == ("gated planes", 1, 28672, 4096)
    found = tune_layer.candidates([], problem)
    assert found[0] == tune_layer.APART and found[1] == plain | {"splits": 1} and len(found) > 6
    assert all(config["splits"] == 1 for config in found[1:])
    assert tune_layer.problem_of("gated", "w8a8", 64) is None  # SiLU-mul rounds to 8 bits there, over the whole row


def test_a_step_of_pairs_is_whole_groups() -> None:
    held = asdict(SkinnyConfig(8, 64, 2, 2, 4, 128))
    assert {c["block_k"] for c in candidates.neighbours(held, "pairs", 4096)} == {128, 256}
    assert {c["block_k"] for c in candidates.neighbours(held, "int8", 4096)} == {64, 128, 256}


class Steady:
    """A chain whose time depends on its gated product alone."""

    def __init__(self, entries: dict[tuple[object, ...], dict[str, object]]) -> None:
        self.entries = entries

    def microseconds(self, replays: int = 5) -> float:
        gated = self.entries.get(("gated planes", 64, 28672, 4096), tune_layer.APART)
        return 100.0 - 5 * (gated["splits"] == 1)


def test_a_product_that_does_not_run_keeps_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    held = asdict(SkinnyConfig(64, 128, 1, 4, 3))
    entries: dict[tuple[object, ...], dict[str, object]] = {("planes", 64, 28672, 4096): held}
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries if part == "entries" else {})
    tried, known = [], tune_layer.candidates
    monkeypatch.setattr(
        tune_layer, "candidates", lambda records, problem: tried.append(problem) or known(records, problem)
    )
    written = tune_layer.descend(Steady(entries), "int4", 64, [])  # type: ignore[arg-type]
    assert entries["gated planes", 64, 28672, 4096]["splits"] == 1
    assert entries["planes", 64, 28672, 4096] == held
    assert {entry["kind"] for entry in written} == {"gated planes"}
    assert ("planes", 64, 28672, 4096) not in tried and ("gated planes", 64, 28672, 4096) in tried


def test_a_search_in_layers_goes_on_behind_what_the_assembler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, held = ("bf16", 64, 4096, 4096), asdict(HopperConfig(64, 128, 1, 4, 3, True, 2))
    entries: dict[tuple[object, ...], dict[str, object]] = {problem: held}

    class Refusing:
        def microseconds(self, replays: int = 5) -> float:
            if entries[problem]["stages"] == 4:
                raise RuntimeError(PTXAS)
            return 100.0 - 5 * (entries[problem]["stages"] == 2)

    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries if part == "entries" else {})
    monkeypatch.setattr(tune_layer, "NAMES", ("o",))
    (found,) = tune_layer.descend(Refusing(), "bf16", 64, [])  # type: ignore[arg-type]
    assert found["config"] == held | {"stages": 2} and found["us"] == 95.0


class Coupled:
    """A chain in which one product's tiles are only good beside the others' of the same M."""

    def __init__(self, entries: dict[tuple[object, ...], dict[str, object]]) -> None:
        self.entries = entries

    def microseconds(self, replays: int = 5) -> float:
        used = {bool(self.entries["bf16", 1, *size]["block_n"] == 128) for size in (SHAPES["qkv"], SHAPES["o"])}
        return {(True,): 90.0, (False,): 100.0}.get(tuple(used), 110.0)


def test_whole_sets_of_tiles_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {1: asdict(SkinnyConfig(8, 16, 1, 1, 4)), 8: asdict(SkinnyConfig(8, 128, 1, 4, 4))}
    entries: dict[tuple[object, ...], dict[str, object]] = {
        ("bf16", m, *size): config for m, config in tiles.items() for size in SHAPES.values()
    }
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries if part == "entries" else {})
    found = tune_layer.descend(Coupled(entries), "bf16", 1, [])  # type: ignore[arg-type]
    assert {e["config"]["block_n"] for e in found if e["problem"][1:] in ([6144, 4096], [4096, 4096])} == {128}
    assert {e["us"] for e in found} == {90.0}


def test_a_search_compiles_ahead_what_it_moves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a layer runs while it is timed was compiled before, by several processes, and once."""
    tiles = {1: asdict(SkinnyConfig(8, 16, 1, 1, 4)), 8: asdict(SkinnyConfig(8, 128, 1, 4, 4))}
    entries: dict[tuple[object, ...], dict[str, object]] = {
        ("bf16", m, *SHAPES[name]): config for m, config in tiles.items() for name in ("qkv", "o")
    }
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries if part == "entries" else {})
    monkeypatch.setattr(tune_layer, "NAMES", ("qkv", "o"))
    compiled: list[str] = []
    shares: list[int] = []
    apart: list[str] = []

    class Pool:
        def map(self, run: object, jobs: list[tuple[str, list[object]]]) -> list[None]:
            assert run is tune_layer._compile and len(jobs) <= 3
            shares.extend(len(pairs) for _, pairs in jobs)
            compiled.extend(f"{pair}" for _, pairs in jobs for pair in pairs)
            return []

    class Watched(Coupled):
        def microseconds(self, replays: int = 5) -> float:
            run = [(("bf16", 1, *SHAPES[name]), self.entries["bf16", 1, *SHAPES[name]]) for name in ("qkv", "o")]
            apart.extend(f"{pair}" for pair in run if f"{pair}" not in compiled)
            return super().microseconds(replays)

    compilers = tune_layer.Compilers(Pool(), 3)  # type: ignore[arg-type]
    tune_layer.descend(Watched(entries), "bf16", 1, [], 2, compilers)  # type: ignore[arg-type]
    assert entries["bf16", 1, *SHAPES["o"]]["block_n"] == 128 and not apart, "the search moved on"
    assert len(compiled) == len(set(compiled)) and max(shares) <= 20 and len(shares) > 3


def test_what_is_asked_ahead_may_stay_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring may be asked for whole by one product and not by the next: no single number for all is as good."""
    tiles = {name: asdict(HopperConfig(8, 64, 1, 4, 6, ahead=ahead)) for name, ahead in (("qkv", 6), ("o", 1))}
    entries: dict[tuple[object, ...], dict[str, object]] = {("bf16", 1, *SHAPES[n]): c for n, c in tiles.items()}
    before = dict(entries)
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries)

    class Chain:
        def microseconds(self, replays: int = 5) -> float:
            return 100.0 + 5.0 * (entries != before)

    assert tune_layer.ask_ahead(Chain(), "bf16", 1) == 100.0 and entries == before  # type: ignore[arg-type]


def test_the_entries_of_4_bit_weights_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_layer, "warp_group_products", lambda: True)
    assert [tune_layer.kind_of("int4", m) for m in (1, 32, 33, 64)] == ["planes", "planes", "hopper", "hopper"]
    assert tune_layer.problem_of("gated", "int4", 64) == ("gated planes", 64, 28672, 4096)
    held = asdict(HopperConfig(64, 128, 2, 4, 3))
    assert [tune_layer.kind_of("int8", m) for m in (1, 32, 33)] == ["pairs", "pairs", "pairs_hopper"]
    assert tune_layer.problem_of("gated", "int8", 64) == ("gated pairs", 64, 28672, 4096)
    assert candidates.neighbours(held, "hopper", 4096) == candidates.neighbours(held, "pairs_hopper", 4096)
    near = [HopperConfig(**c) for c in candidates.neighbours(held, "hopper", 4096)]
    assert replace(HopperConfig(**held), producer=True) in near and all(c.warps % 4 == 0 for c in near)
    assert all(sum(asdict(c)[name] != held[name] for name in held) == 1 for c in near)


def test_neighbours_have_the_registers_that_ptxas_wants() -> None:
    """Without them it refuses, and prints all of its input."""
    held = asdict(HopperConfig(128, 128, 1, 4, 3, True, 2))
    assert {c["warps"] for c in candidates.neighbours(held, "pairs_hopper", 4096)} == {4}
    assert {c["warps"] for c in candidates.neighbours(held | {"producer": False}, "pairs_hopper", 4096)} == {4, 8}
    assert {c["warps"] for c in candidates.neighbours(held | {"programs": 1}, "pairs_hopper", 4096)} == {4, 8}


@pytest.mark.parametrize(
    "format, m, kind",
    [("int4", 64, "planes"), ("bf16", 1, "bf16"), ("w8a8", 1, "int8"), ("w8a8", 64, "a8w8"), ("int8", 64, "pairs"),
     ("w4a8", 64, "planes"), ("w4a8", 128, "a8w4")],
)
def test_the_entry_that_a_format_reads(format: str, m: int, kind: str) -> None:
    assert tune_layer.kind_of(format, m) == kind

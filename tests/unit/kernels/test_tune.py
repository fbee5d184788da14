"""From timings to the configuration that a product is launched with."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from kernels import KV_FORMATS, PackedWeight, candidates, pack_weight, tune, tune_layer, tuning
from kernels.bench.matmul import tiles_alone
from kernels.measuring.problems import SHAPES
from kernels.products import a16w4_hopper, a16w8_hopper, bf16_hopper, matmul_triton
from kernels.tuning import HopperConfig, SkinnyConfig, WideConfig

H200_FILE = json.loads((tuning.TUNED / "NVIDIA_H200.json").read_text())
H200 = H200_FILE["entries"]
SHARED = 227 << 10  # bytes of shared memory that a program may have on compute capability 9.0


def named(entry: dict[str, Any]) -> str:
    return "-".join(map(str, (entry["kind"], *entry["problem"])))


@pytest.mark.parametrize("m", [64, 256, 2048, 8192])
def test_candidates_of_a8w8(m: int) -> None:
    found = candidates.a8w8_candidates(m)
    assert len(found) >= 24 and len(set(found)) == len(found)
    for config in found:
        assert (config.block_m + config.block_n) * config.block_k * config.stages <= SHARED
        assert config.block_m <= max(m, 16)
    assert m > 256 or {config.splits for config in found} > {1}


@pytest.mark.parametrize("m", [128, 192, 256, 512])
def test_candidates_of_a8w4(m: int) -> None:
    found = candidates.a8w4_candidates(m)
    assert len(found) >= 24 and len(set(found)) == len(found)
    for config in found:
        assert (config.block_m * 128 + config.block_n * 64) * config.stages <= SHARED


def takes(config: HopperConfig, kind: str = "hopper") -> bool:
    """What the kernels for Hopper and a multiprocessor's shared memory allow."""
    row = 256 if "bf16" in kind else 128 if "pairs" in kind else 68
    slot = (config.block_m * 256 + config.block_n * row) * config.block_k // 128
    program = config.stages * (slot + 16) + 1024  # which the driver keeps
    fits = program <= SHARED and program * config.programs <= SHARED + 1024
    return fits and config.block_n % max(64, 16 * config.warps) == 0 and config.ahead <= config.stages >= 2


@pytest.mark.parametrize("m", [64, 128, 256, 512, 2048])
@pytest.mark.parametrize("n", [4096, 28672])
@pytest.mark.parametrize("kind", ["hopper", "pairs_hopper"])
def test_candidates_for_hopper(kind: str, m: int, n: int) -> None:
    found = candidates.matmul_candidates(kind, m, n)
    assert len(found) >= 10 and len(set(found)) == len(found)
    assert all(takes(config, kind) for config in found)
    assert {config.producer for config in found} == {False, True}
    assert n > 4096 or m > 512 or len({config.splits for config in found}) > 2


@pytest.mark.parametrize("m", [128, 192, 256, 512])
@pytest.mark.parametrize("n, k", SHAPES.values())
def test_candidates_of_bf16_at_many_rows(m: int, n: int, k: int) -> None:
    found = candidates.matmul_candidates("bf16_hopper", m, n, True)
    assert len(found) >= 20 and len(set(found)) == len(found) and all(takes(c, "bf16_hopper") for c in found)
    assert all(c.splits == 1 or c.splits * m * n * 4 <= 36 << 20 for c in found), "test_partial_sums_stay_small"
    assert {c.producer for c in found} == {False, True} and {c.block_k for c in found} == {64, 128}


@pytest.mark.parametrize(
    "kind, m",
    [*product(("planes", "pairs"), (1, 16, 32)), ("bf16", 1), ("bf16", 64)],
)
@pytest.mark.parametrize("n, k", SHAPES.values())
def test_candidates_of_few_rows(kind: str, m: int, n: int, k: int) -> None:
    """On Hopper either kernel may be the better one, so that both are tried."""
    older, hopper = (candidates.matmul_candidates(kind, m, n, hopper) for hopper in (False, True))
    found = [c for c in hopper if isinstance(c, HopperConfig)]
    assert not any(isinstance(c, HopperConfig) for c in older) and len(found) >= 24 and len(set(found)) == len(found)
    assert all(takes(c, kind) for c in found) and {c.ahead > 0 for c in found} == {c.producer for c in found}
    gated = candidates.gated_hopper_candidates(f"gated {kind}", m)
    assert gated and all(takes(c, kind) and c.splits == 1 and c.block_n % (32 * c.warps) == 0 for c in gated)


@pytest.mark.parametrize("format, kind", [("int4", "planes"), ("int8", "pairs"), ("bf16", "bf16")])
def test_an_entry_says_by_which_kernel_few_rows_run(format: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = HopperConfig(16, 128, 1, 4, 4, True, 3, 1)
    entries = {(each, 16, 256, 512): asdict(tiles) for each in (kind, f"gated {kind}")}
    monkeypatch.setattr(tuning, "table", lambda: entries)
    run: list[tuple[object, bool]] = []

    def noted(x: torch.Tensor, weight: PackedWeight, config: HopperConfig, gated: bool = False) -> torch.Tensor:
        run.append((config, gated))
        return torch.empty(1, x.shape[0], 128 if gated else 256)

    here = {"int4": a16w4_hopper, "int8": a16w8_hopper, "bf16": bf16_hopper}[format]
    monkeypatch.setattr(here, here.__name__.rpartition(".")[2] + "_partials", noted)
    x, layout = torch.ones(16, 512).bfloat16(), {"int4": "planes", "int8": "pairs", "bf16": "plain"}[format]
    weight = pack_weight(torch.ones(256, 512), format, device="cpu", layout=layout)
    matmul_triton.linear_partials(x, weight)
    assert matmul_triton.gated_fused(x, weight) is not None
    assert run == [(tiles, False), (tiles, True)]
    other = pack_weight(torch.ones(256, 512), "int4", group_size=64, device="cpu", layout="planes")
    assert isinstance(matmul_triton.four_bit_config(16, other), SkinnyConfig)
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 256])
def test_candidates_of_pairs(m: int) -> None:
    found = candidates.matmul_candidates("pairs", m, 4096)
    assert len(found) >= 24 and len(set(found)) == len(found)
    for config in found:
        assert config.block_k % 128 == 0 and config.block_n >= 16 * config.warps and config.block_m <= max(m, 8)
        assert (config.block_m * 2 + config.block_n) * config.block_k * config.stages <= SHARED


def test_a_gpu_is_tuned_for_the_kernels_that_it_runs() -> None:
    older, hopper = tune.kinds(hopper=False), tune.kinds(hopper=True)
    own = {"hopper", "pairs_hopper", "bf16_hopper"}
    assert not own & {*older} and own < {*hopper} and "wide" not in hopper and len(older) == len(hopper) - 2
    for kind in {*older, *hopper}:
        assert tune.tasks([kind], 150, kind in hopper), kind


@pytest.mark.parametrize("m", [33, 64, 100, 256, 300, 2048])
@pytest.mark.parametrize("n, k", [*SHAPES.values(), (320, 512)])
def test_tiles_for_hopper_with_and_without_an_entry(m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {(e["kind"], *e["problem"]): e["config"] for e in H200}
    for held in (entries, {}):
        monkeypatch.setattr(tuning, "table", lambda held=held: held)
        assert takes(tuning.hopper_config(m, n, k)) and takes(tuning.pairs_hopper_config(m, n, k), "pairs_hopper")


def test_by_which_kernel_4_bit_weights_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {
        g: PackedWeight("int4", "planes", (128, 256), torch.empty(0), torch.empty(0), group_size=g) for g in (64, 128)
    }
    for hopper in (False, True):
        monkeypatch.setattr(matmul_triton, "warp_group_products", lambda hopper=hopper: hopper)
        for m, group in product((1, 32, 33, 64, 65, 2048), (64, 128)):
            found = type(matmul_triton.four_bit_config(m, weights[group]))
            fast = hopper and group == 128
            small = SkinnyConfig if m <= (32 if fast else 64) else None
            assert found is (small or (HopperConfig if fast else WideConfig)), (hopper, m, group)
        assert matmul_triton.fused_rows(weights[128]) == (2048 if hopper else 256)
        assert matmul_triton.fused_rows(weights[64]) == 256


def test_by_which_kernel_int8_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {k: PackedWeight("int8", "pairs", (128, k), torch.empty(0), torch.empty(0)) for k in (200, 202)}
    for hopper in (False, True):
        monkeypatch.setattr(matmul_triton, "warp_group_products", lambda hopper=hopper: hopper)
        for m, k in product((1, 32, 33, 64, 256, 2048), (200, 202)):
            fast = hopper and k == 200 and m > 32  # rows of x that TMA can step over
            assert isinstance(matmul_triton.pairs_tiles(m, weights[k]), HopperConfig if fast else SkinnyConfig)
        assert matmul_triton.fused_rows(weights[200]) == (2048 if hopper else 256)
        assert matmul_triton.fused_rows(weights[202]) == 256


@pytest.mark.parametrize("roomy", [False, True])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_every_rule_of_decode_attention_fits(format: str, roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "roomy", lambda: roomy)
    for batch, tokens in product((1, 2, 4, 8, 16, 32, 64, 128, 256), (64, 1024, 8192, 1 << 17)):
        config = tuning.decode_config(format, batch, 8, tokens)
        assert 1 <= config.splits <= min(128, -(-tokens // config.min_split))
        held = config.tile * KV_FORMATS[format].bytes_per_token(1, 128) * config.stages
        assert held <= (SHARED if roomy else 99 << 10), (batch, tokens, config)


@pytest.mark.parametrize("tuned", [False, True])
def test_partial_sums_stay_small(tuned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules and by the tiles of the file: the engine's memory plan counts 36 MB for them."""
    entries = {(e["kind"], *e["problem"]): e["config"] for e in H200} if tuned else {}
    monkeypatch.setattr(tuning, "table", lambda: entries)
    for m, (n, k) in product((1, 8, 16, 17, 32, 33, 64, 65, 128, 192, 256, 257, 512, 2048), SHAPES.values()):
        few = [tuning.planes_config(m, n, k, 128), tuning.pairs_config(m, n, k), tuning.plain_config(m, n, k, 2)]
        some = [tuning.hopper_config(m, n, k), tuning.pairs_hopper_config(m, n, k), tuning.a8w8_config(m, n, k)]
        used = (few if m <= 64 else []) + (some if m > 16 else [])
        used += [tuning.a8w4_config(m, n, k, 128)] if 64 < m <= 512 else []
        used += [tuning.wide_config(m, n, k, 128), tuning.pairs_config(m, n, k)] if 64 < m <= 256 else []
        if tiles := tuning.bf16_hopper_config(m, n, k):
            used.append(tiles)
        for config in used:
            assert config.splits == 1 or config.splits * m * n * 4 <= 36 << 20, (m, n, k, config)


@pytest.mark.parametrize("part", ["entries", "alone"])
def test_tiles_for_hopper_in_the_file_fit(part: str) -> None:
    entries = [e for e in H200_FILE[part] if "producer" in e["config"]]
    assert entries
    for entry in entries:
        kind = entry["kind"].removeprefix("gated ")
        assert takes(HopperConfig(**entry["config"]), kind), named(entry)


@pytest.mark.parametrize("entry", [e for e in H200 if "kernels.tune --op" in e.get("command", "")], ids=named)
def test_what_was_tuned_is_tried_by_the_command_that_it_names(entry: dict[str, Any]) -> None:
    (op,) = [word for word in entry["command"].split() if word in ("int8", "a8w4")]
    m, n, k = entry["problem"]
    tried = [c for _, asked, c in tune.tasks([op], 1 << 20) if (asked["m"], asked["n"], asked["k"]) == (m, n, k)]
    assert len(tried) == 1 and entry["kind"] == op
    assert replace(type(tried[0][0])(**entry["config"]), late=False) in tried[0]


def test_every_shape_of_a_7b_is_tuned() -> None:
    problems = {(a["m"], a["n"], a["k"]) for _, a, _ in tune.tasks(["a8w8"], 150)}
    assert {(m, n, k) for m in (64, 256, 2048) for n, k in SHAPES.values()} <= problems


def test_the_fastest_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast, slow = WideConfig(64, 32, 4, 4, 3, 256), WideConfig(64, 64, 1, 4, 3, 128)
    records = [
        {"op": "a8w8", "m": m, "n": 4096, "k": 4096, "us": us, "config": asdict(config)}
        for m, us, config in ((64, 9.0, slow), (64, 5.0, fast), (8192, 1.0, slow))
    ]
    text = tune.file_text({"gpu": "NVIDIA Test"}, {"entries": tune.merged([], tune.entries(records)), "alone": []})
    assert len(json.loads(text)["entries"]) == 1  # 8192 cubed is a benchmark
    (tmp_path / "NVIDIA_Test.json").write_text(text)
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    tuning.table.cache_clear()
    try:
        assert tuning.a8w8_config(50, 4096, 4096) == fast
        for other in ((50, 4096, 4096, False), (65, 4096, 4096), (50, 4096, 14336)):
            assert tuning.a8w8_config(*other) != fast
    finally:
        tuning.table.cache_clear()


def test_bf16_of_more_rows_is_kept_where_it_beats_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, sizes = asdict(HopperConfig(128, 128, 1, 4, 3)), {"m": 256, "n": 4096, "k": 4096}
    slow, fast = ({"op": "bf16_hopper", "format": "bf16", **sizes, "us": us, "config": tiles} for us in (21.0, 19.0))
    cublas = {"op": "cublas", "format": "bf16", **sizes, "us": 20.0, "config": {}}
    (kept,) = tune.merged([], tune.entries([cublas, fast, slow]))
    assert (kept["kind"], kept["us"], kept["config"]) == ("bf16_hopper", 19.0, tiles)
    (again,) = tune.merged([kept], tune.entries([slow, cublas]))
    assert (again["kind"], again["us"], again["config"]) == ("bf16_hopper", 20.0, {}), "what was faster once is gone"
    entries = {("bf16_hopper", 256, 4096, 4096): tiles, ("bf16_hopper", 128, 4096, 4096): again["config"]}
    monkeypatch.setattr(tuning, "table", lambda: entries)
    assert tuning.bf16_hopper_config(200, 4096, 4096) == HopperConfig(**tiles)
    assert tuning.bf16_hopper_config(100, 4096, 4096) is None, "at 128 rows cuBLAS was the faster"
    assert tuning.bf16_hopper_config(300, 4096, 4096) is None, "nothing was tuned"
    ran: list[object] = []
    monkeypatch.setattr(matmul_triton, "streamed", lambda x, weight, config: ran.append(config) or x[None, :, :1])
    weight = pack_weight(torch.ones(4096, 4096), "bf16", device="cpu", layout="plain")
    for rows, launched in ((200, 1), (300, 1)):
        matmul_triton.linear_triton(torch.ones(rows, 4096).bfloat16(), weight, None)
        assert len(ran) == launched
    assert {len(set(task[2])) for task in tune.tasks(["bf16_hopper"], 500, True) if task[0] == "cublas"} == {1}


PTXAS = "PTXAS error: ptxas fatal : (C7602) Insufficient registers (80) to compile instruction at line 412"


def test_what_the_assembler_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, wrong = (HopperConfig(128, 128, 1, warps, 3, True, 2) for warps in (4, 8, 12))

    def timed(config: HopperConfig, **_: object) -> float:
        if config != small:
            raise RuntimeError(PTXAS if config == large else "an illegal memory access was encountered")
        return 5.0

    monkeypatch.setattr(tune, "_runner", lambda *_: lambda config: config)
    monkeypatch.setattr(tune, "microseconds", timed)
    (found,) = tune.run([("bf16_hopper", {"m": 128}, [large, small])], workers=1)
    assert found["config"] == asdict(small)
    with pytest.raises(RuntimeError, match="illegal memory"):
        tune.run([("bf16_hopper", {"m": 128}, [wrong])], workers=1)


def test_alone_cublas_is_timed_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SimpleNamespace(x=torch.ones(2, 8), weights=[SimpleNamespace(data=torch.ones(4, 8))] * 2)
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr(tune.problems, "matmul", lambda **_: problem)
    monkeypatch.setattr(tune, "_consumer", lambda _: lambda y: read.append(tuple(y.shape)))
    for alone, want in ((True, []), (False, [(1, 2, 4)] * 2)):
        for call in tune._runner("cublas", {}, alone)(None):
            call()
        assert read == want


def test_what_is_fastest_alone_stands_beside_what_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used, alone = asdict(SkinnyConfig(8, 64, 2, 2, 4)), asdict(HopperConfig(8, 256, 2, 4, 5, True, 2, 5))
    entry = {"kind": "planes", "problem": [1, 28672, 4096], "us": 1.0}
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(tune, "TUNED", tmp_path)
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    tuning.table.cache_clear()
    try:
        tune.write_entries([{**entry, "config": alone}], "alone", "alone")
        tune.write_entries([{**entry, "config": used}], "in layers")
        assert tuning.planes_config(1, 28672, 4096, 128) == SkinnyConfig(**used)
        assert tiles_alone("int4", 1, 28672, 4096) == HopperConfig(**alone)
        assert tiles_alone("int4", 16, 28672, 4096) is None and tiles_alone("bf16", 1, 28672, 4096) is None
    finally:
        tuning.table.cache_clear()


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
    assert {c["block_k"] for c in tune_layer.neighbours(held, "pairs")} == {128, 256}
    assert {c["block_k"] for c in tune_layer.neighbours(held, "int8")} == {64, 128, 256}


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


def test_a_search_in_layers_goes_back_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What beat it alone may not beside its neighbours."""
    monkeypatch.setattr(tune_layer, "warp_group_products", lambda: True)
    entries: dict[tuple[object, ...], dict[str, object]] = {
        ("bf16_hopper", m, *SHAPES[name]): asdict(HopperConfig(128, 128, 1, 4, 3))
        for m, name in ((128, "qkv"), (128, "o"), (256, "o"))
    }
    entries["bf16_hopper", 256, *SHAPES["qkv"]] = tune_layer.CUBLAS
    monkeypatch.setattr(tune_layer, "table", lambda part="entries": entries if part == "entries" else {})

    class Chain:
        def microseconds(self, replays: int = 5) -> float:
            assert all(HopperConfig(**c) for c in entries.values() if c)
            return 100.0 + sum(bool(entries.get(("bf16_hopper", 128, *SHAPES[name]))) for name in ("o", "down"))

    found = tune_layer.descend(Chain(), "bf16", 128, [])  # type: ignore[arg-type]
    assert {tuple(e["problem"][1:]): bool(e["config"]) for e in found} == {SHAPES["qkv"]: True, SHAPES["o"]: False}
    assert ("bf16_hopper", 128, *SHAPES["down"]) not in entries and {e["us"] for e in found} == {100.0}


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
    assert tune_layer.neighbours(held, "hopper") == tune_layer.neighbours(held, "pairs_hopper")
    near = [HopperConfig(**c) for c in tune_layer.neighbours(held, "hopper")]
    assert replace(HopperConfig(**held), producer=True) in near and all(c.warps % 4 == 0 for c in near)
    assert all(sum(asdict(c)[name] != held[name] for name in held) == 1 for c in near)


def test_neighbours_have_the_registers_that_ptxas_wants() -> None:
    """Without them it refuses, and prints all of its input."""
    held = asdict(HopperConfig(128, 128, 1, 4, 3, True, 2, block_k=64))
    assert {c["warps"] for c in tune_layer.neighbours(held, "bf16_hopper")} == {4}
    assert {c["warps"] for c in tune_layer.neighbours(held | {"producer": False}, "bf16_hopper")} == {4, 8}
    assert {c["warps"] for c in tune_layer.neighbours(held | {"programs": 1}, "bf16_hopper")} == {4, 8}


@pytest.mark.parametrize(
    "format, m, kind",
    [("int4", 64, "planes"), ("bf16", 1, "bf16"), ("w8a8", 1, "int8"), ("w8a8", 64, "a8w8"), ("int8", 64, "pairs"),
     ("w4a8", 64, "planes"), ("w4a8", 128, "a8w4")],
)
def test_the_entry_that_a_format_reads(format: str, m: int, kind: str) -> None:
    assert tune_layer.kind_of(format, m) == kind

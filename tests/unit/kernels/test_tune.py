"""From timings to the configuration that a product is launched with."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from kernels import KV_FORMATS, PackedWeight, candidates, pack_weight, tune, tuning
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
    program = config.stages * (config.block_m * 256 + config.block_n * row + 16) + 1024  # which the driver keeps
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


def test_a_second_look_stays_near_the_fastest() -> None:
    """Each differs from one of them in one respect, and none was tried."""
    tried = [c for c in candidates.matmul_candidates("planes", 1, 4096, True) if isinstance(c, HopperConfig)]
    size = {"format": "int4", "m": 1, "n": 4096, "k": 14336}
    records = [{"op": "planes", **size, "us": 10.0 + i, "config": asdict(c)} for i, c in enumerate(tried)]
    many_rows = {**records[0], "op": "hopper", "m": 64, "us": 1.0}
    ((op, arguments, found),) = tune.second_look([*records, many_rows], 2)
    assert (op, arguments) == ("planes", size) and len(found) >= 12 and len(set(found)) == len(found)
    assert not set(found) & set(tried) and all(isinstance(c, HopperConfig) for c in found)
    for config in found:
        assert any(len(asdict(config).items() - asdict(fast).items()) == 1 for fast in tried[:2])
    assert not tune.second_look([many_rows], 2)


def test_steps_are_parted_evenly_between_powers_of_two() -> None:
    assert set(candidates.other_splits(16, 14336)) == {23, 19, 14, 13}
    assert set(candidates.other_splits(32, 4096)) == {16, 11}


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
    assert not {"hopper", "pairs_hopper"} & {*older} and "wide" not in hopper and len(older) == len(hopper) - 1
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


PTXAS = "PTXAS error: ptxas fatal : (C7602) Insufficient registers (80) to compile instruction at line 412"


def test_what_the_assembler_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, wrong = (HopperConfig(128, 128, 1, warps, 3, True, 2) for warps in (4, 8, 12))

    def timed(config: HopperConfig, **_: object) -> float:
        if config != small:
            raise RuntimeError(PTXAS if config == large else "an illegal memory access was encountered")
        return 5.0

    monkeypatch.setattr(tune, "_runner", lambda *_: lambda config: config)
    monkeypatch.setattr(tune, "microseconds", timed)
    (found,) = tune.run([("pairs_hopper", {"m": 128}, [large, small])], workers=1)
    assert found["config"] == asdict(small)
    with pytest.raises(RuntimeError, match="illegal memory"):
        tune.run([("pairs_hopper", {"m": 128}, [wrong])], workers=1)


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

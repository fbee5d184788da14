"""8-bit weights and activations on a CUDA device, against float64; the operators in a graph.

    python -m pytest tests/gpu/test_eight_bits_gpu.py -q
"""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import library
from kernels.rows.rounding import quantize_rows
from kernels.tuning import WideConfig
from tests.unit.kernels import checks_8_bit as checks
from tests.unit.kernels.checks import normal, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none here"),
]
CODES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1000, 2304), (6144, 1808)])  # N = 1000 is not for cuBLAS's fp8
def test_linear(m: int, n: int, k: int, format: str) -> None:
    checks.check_linear(m, n, k, format, "cuda", impl="triton", bias=m in (5, 65))


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m", [1, 7, 16, 17, 64, 128, 300])
@pytest.mark.parametrize("n, k", [(128, 256), (4096, 1024), (1000, 4096), (72, 14336)])
def test_linear_integers_exact(m: int, n: int, k: int, format: str) -> None:
    checks.check_linear_exact(m, n, k, format, "cuda", impl="triton")


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m, n, k", [(20, 72, 336), (64, 4096, 14336)])
def test_splits_of_k(m: int, n: int, k: int, format: str) -> None:
    checks.check_splits(m, n, k, format, "cuda")


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("m", [1, 16, 64, 65, 100, 256, 512, 513, 1000])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1000, 2304), (6144, 1024)])
def test_4_bit_weights(m: int, n: int, k: int, group_size: int) -> None:
    checks.check_linear(m, n, k, "w4a8", "cuda", impl="triton", bias=m in (64, 65), group_size=group_size)


TILES = [
    (64, 64, 4), (64, 256, 8), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 64, 4), (256, 128, 8),
]  # fmt: skip


@pytest.mark.parametrize("block_m, block_n, warps", TILES)
@pytest.mark.parametrize("m, n, k, splits", [(65, 4096, 1024, 1), (100, 1008, 4096, 3), (256, 72, 14336, 4)])
def test_4_bit_weights_bit_for_bit(
    m: int, n: int, k: int, splits: int, block_m: int, block_n: int, warps: int
) -> None:
    """The register operand of the warp-group product in every tile shape."""
    checks.check_a8w4_exact(m, n, k, 128, "cuda", WideConfig(block_m, block_n, splits, warps, 3))


@pytest.mark.parametrize("m", [65, 128, 200, 256, 512])
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("group_size", [64, 128])
def test_4_bit_weights_bit_for_bit_as_tuned(m: int, n: int, k: int, group_size: int) -> None:
    checks.check_a8w4_exact(m, n, k, group_size, "cuda")


@pytest.mark.parametrize("group_size", [64, 128])
def test_4_bit_weights_requantized_once(group_size: int) -> None:
    checks.check_requantized_once(300, 1000, 2304, group_size, "cuda", 256 * 2304)


@pytest.mark.parametrize("format", ["w8a8", "fp8", "w4a8"])
@pytest.mark.parametrize("m", [100, 600])
def test_rows_that_are_not_finite(format: str, m: int) -> None:
    checks.check_broken_rows(m, format, "cuda", impl="triton")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("rows, width", [(6, 300), (1, 4096), (300, 14336)])
def test_quantize_rows(rows: int, width: int, codes: torch.dtype) -> None:
    checks.check_quantize(rows, width, codes, "cuda", impl="triton")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("rows, width", [(6, 300), (64, 4096), (300, 14336)])
def test_fused(rows: int, width: int, codes: torch.dtype) -> None:
    checks.check_fused(rows, width, codes, "cuda", impl="triton")


@pytest.mark.parametrize("format", ["int8", "w8a8", "fp8", "w4a8"])
@pytest.mark.parametrize("m", [8, 64, 100])
def test_captured_in_a_graph(format: str, m: int) -> None:
    """The operators, and what they call, on changing inputs of one CUDA graph."""
    ops = library.register()
    weight = kernels.pack_weight(normal((2048, 1024), 1, "cuda") * 0.05, format, device="cuda")
    static = normal((m, 1024), 2, "cuda")
    ops.linear(static, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(static, weight)
    for seed in (3, 4):
        fresh = normal((m, 1024), seed, "cuda")
        static.copy_(fresh)
        graph.replay()
        codes = kernels.rows.activations.activation_codes(format, m)
        held = fresh.double() if codes is None else quantize_rows(fresh, codes, impl="torch").dequantize(torch.float64)
        assert relative_error(out, held @ checks.multiplied(weight, codes).t()) < 4e-3


def test_a_compiled_step_keeps_one_operator_each() -> None:
    ops = library.register()
    shapes = ((1024, 256), (256, 512))
    gate_up, down = (kernels.pack_weight(normal(shape, 1, "cuda") * 0.05, "fp8", device="cuda") for shape in shapes)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        eight = ops.quantized_silu_mul(ops.linear(x, gate_up), torch.float8_e4m3fn)
        return ops.linear(eight, down)

    x = normal((33, 256), 5, "cuda")
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mlp(x))

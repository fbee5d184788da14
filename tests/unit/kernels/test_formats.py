"""Formats state their bytes honestly, and bad input is refused in a sentence that names it."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.formats.packing import device_layout

WEIGHT = torch.randn(192, 256)


@pytest.mark.parametrize("format", kernels.WEIGHT_FORMATS)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("layout", [None, "cuda"])
def test_weight_bytes(format: str, group_size: int, layout: str | None) -> None:
    chosen = device_layout(format, torch.device("cuda"), (192, 256)) if layout else None
    packed = kernels.pack_weight(WEIGHT, format, group_size=group_size, device="cpu", layout=chosen)
    assert packed.nbytes == kernels.WEIGHT_FORMATS[format].nbytes(192, 256, group_size)


@pytest.mark.parametrize("format", kernels.WEIGHT_FORMATS)
@pytest.mark.parametrize("layout", [None, "cuda"])
def test_layouts_hold_the_same_weights(format: str, layout: str | None) -> None:
    plain = kernels.quantize_weight(WEIGHT, format)
    chosen = device_layout(format, torch.device("cuda"), (192, 256)) if layout else None
    back = kernels.pack_weight(plain, format, device="cpu", layout=chosen).to_plain()
    assert torch.equal(back.codes.float(), plain.codes.float())
    for got, want in ((back.scale, plain.scale), (back.zero, plain.zero)):
        assert (got is None) == (want is None)
        assert got is None or want is None or torch.equal(got, want)


@pytest.mark.parametrize(
    "format, factor", [("bf16", 1.0), ("int8", 1.94), ("int4", 3.76), ("fp8", 1.94), ("k8v4", 2.56)]
)
def test_kv_bytes(format: str, factor: float) -> None:
    layer = kernels.allocate_kv(format, 4, 16, 8, 128, "cpu")
    per_token = kernels.KV_FORMATS[format].bytes_per_token(8, 128)
    assert layer.nbytes == 64 * per_token
    assert kernels.KV_FORMATS["bf16"].bytes_per_token(8, 128) / per_token == pytest.approx(factor, abs=0.005)


def test_zero_range_and_zero_rows() -> None:
    for value in (0.0, 2.5, -2.5):
        for format in ("int8", "int4"):
            held = kernels.quantize_weight(torch.full((64, 128), value), format).dequantize()
            assert held.isfinite().all() and torch.allclose(held, torch.full((64, 128), value), rtol=4e-3)


@pytest.mark.parametrize("format", kernels.WEIGHT_FORMATS)
def test_weights_of_all_sizes(format: str) -> None:
    """From denormal to the largest: every format, and the int8 form of 4 bits, keep to their grid or give zero. No
    scale is denormal: quotients of such overflow e4m3, their reciprocals float32."""
    sign = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).sign()
    for exponent in (-45, -42, -40, -38, -37, -36, -30, -29, -28, -27, -20, 20, 30, 37):
        for factor in (1.0, 1.3, 1.7, 2.9):
            weight = (sign.double() * factor * 10.0**exponent).float()
            held = kernels.quantize_weight(weight, format)
            forms = [held, held.requantized()] if format == "w4a8" else [held]
            for form in forms:
                error = (form.dequantize(torch.float64) - weight.double()).abs().max()
                bound = 0.1 if kernels.WEIGHT_FORMATS[format].code_bits == 4 else 0.07  # half a step, of e4m3 at most
                assert error <= max(bound * factor * 10.0**exponent, 3e-28), f"{format}: {factor}e{exponent}"
                assert form.dequantize().isfinite().all()
                assert form.scale is None or form.scale.min() > 2.0**-105


BAD = [
    (lambda: kernels.quantize_weight(torch.randn(4, 200), "int4"), "200 is not a multiple of 128"),
    (lambda: kernels.quantize_weight(torch.randn(4, 256), "int4", 32), "64, 128.*not 32"),
    (lambda: kernels.quantize_weight(torch.full((4, 128), float("nan")), "int8"), "NaN"),
    (lambda: kernels.quantize_weight(torch.full((4, 128), float("-inf")).half(), "bf16"), "infinity"),
    (lambda: kernels.quantize_weight(torch.full((4, 128), 3e38), "int4"), r"beyond 1e\+38"),
    (lambda: kernels.quantize_weight(torch.full((4, 128), -1e39, dtype=torch.float64), "int8"), r"beyond 1e\+38"),
    (lambda: kernels.quantize_weight(torch.empty(0, 128), "int8"), r"\[N, K\] matrix, not torch.float32 \(0, 128\)"),
    (lambda: kernels.quantize_weight(torch.randn(4, 128), "int3"), "bf16.*int4.*not 'int3'"),
    (lambda: kernels.linear(torch.randn(1, 128), packed(), impl="cuda"), "'aten'.*'torch'.*'triton'.*not 'cuda'"),
    (lambda: kernels.linear(torch.randn(1, 128).bfloat16(), packed(), impl="triton"), "needs CUDA tensors"),
    (lambda: kernels.linear(torch.randn(1, 128), packed(), impl="aten"), "float32; use impl='torch'"),
    (lambda: kernels.linear(torch.randn(1, 64).bfloat16(), packed()), "64 features"),
    (lambda: kernels.linear(torch.randn(1, 128).bfloat16(), packed(), torch.zeros(1)), r"must be \[64\], not \[1\]"),
    (lambda: kernels.allocate_kv("int3", 1, 16, 1, 64, "cpu"), "not 'int3'"),
    (lambda: kernels.allocate_kv("int8", 1, 16, 1, 80, "cpu"), "64, 128.*not 80"),
    (lambda: kernels.allocate_kv("int8", 1, 17, 1, 64, "cpu"), "16, 32, 64, 128.*not 17"),
    (lambda: kernels.allocate_kv("int8", 0, 16, 1, 64, "cpu"), "at least 1, not 0"),
]


def packed() -> kernels.PackedWeight:
    return kernels.pack_weight(torch.randn(64, 128), "int8", device="cpu")


def attend(lengths: list[int], table: list[int], impl: str, chunk: int | None = None) -> torch.Tensor:
    layer = kernels.allocate_kv("int8", 4, 16, 2, 64, "cpu")
    q = torch.randn(chunk or len(lengths), 4, 64).bfloat16()
    tables, held = torch.tensor([table] * len(lengths)).int(), torch.tensor(lengths).int()
    if chunk is None:
        return kernels.decode_attention(q, layer, tables, held, 0.125, impl=impl)
    return kernels.prefill_attention(q, layer, tables, torch.tensor([0, chunk]).int(), held, 0.125, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "aten"])
@pytest.mark.parametrize(
    "lengths, table, chunk, error, words",
    [
        ([40], [0, 1], None, ValueError, "40 tokens.* blocks"),
        ([40], [0, 1], 3, ValueError, "40 tokens.* blocks"),
        ([5], [0], 6, ValueError, "chunk of 6 tokens cannot be the end of 5"),
        ([20], [0, -1], None, (ValueError, IndexError), "blocks|out of range"),
        ([20], [0, 4], None, IndexError, "out of"),
    ],
)
def test_attention_reads_no_token_that_is_not_there(
    lengths: list[int], table: list[int], chunk: int | None, error: type[Exception], words: str, impl: str
) -> None:
    with pytest.raises(error, match=words):
        attend(lengths, table, impl, chunk)


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()

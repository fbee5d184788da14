"""8-bit activations and weights on the CPU: the packed paths and the reference, against float64; bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.formats import packing
from kernels.formats.cpu_layouts import has_packed_int8
from kernels.formats.packing import ONEDNN8_FROM, device_layout
from kernels.products.matmul import widen_e4m3
from kernels.rows.activations import Activations, activation_codes, codes_for
from kernels.rows.rounding import quantize_rows, quantized_silu_mul
from tests.unit.kernels import checks_8_bit as checks
from tests.unit.kernels.checks_8_bit import SIXTEEN_BIT_ROWS

CODES = [torch.int8, torch.float8_e4m3fn]
needs_packed_int8 = pytest.mark.skipif(not has_packed_int8(), reason="oneDNN has no fast int8 product on this CPU")


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(192, 256), (100, 336)])
def test_linear(m: int, n: int, k: int, format: str, impl: str) -> None:
    checks.check_linear(m, n, k, format, "cpu", impl=impl, bias=m in (5, 17))


@needs_packed_int8
@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("m", [1, 2, 5, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(192, 256), (100, 336), (1, 16), (257, 4096)])
def test_packed_by_onednn(m: int, n: int, k: int, impl: str) -> None:
    checks.check_linear(m, n, k, "w8a8", "cpu", impl=impl, layout="onednn8", bias=m in (5, 17))


@needs_packed_int8
@pytest.mark.parametrize("m", [1, 2, 5, 16, 17, 64, 65, 256])
@pytest.mark.parametrize("n, k", [(80, 256), (100, 4880)])
def test_packed_by_onednn_is_exact(m: int, n: int, k: int) -> None:
    """Codes to both ends: no sum of any two products fits 16 bits. Every bit must be that of the exact sums, scaled, as
    from plain codes, and from codes of x whose rows do not follow one another."""
    g = checks.generator(m, "cpu")
    codes = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    x = checks.any_codes(m, k, "cpu")
    codes[0], x.codes[-1] = -127, -127
    plain = kernels.QuantizedWeight("w8a8", codes, torch.rand(n, generator=g).bfloat16().float())
    sums = x.codes.double() @ codes.double().t()
    assert plain.scale is not None
    want = (sums.float() * plain.scale * x.scale[:, None]).bfloat16()
    strided = replace(x, codes=x.codes.t().contiguous().t())
    for layout in ("onednn8", "int8pack"):
        weight = kernels.pack_weight(plain, "w8a8", device="cpu", layout=layout)
        for given in (x, strided):
            assert torch.equal(kernels.linear(given, weight), want), layout


@needs_packed_int8
@pytest.mark.parametrize("n, k", [(1, 16), (100, 336), (192, 256), (896, 4864)])
def test_packed_by_onednn_keeps_codes_and_scales(n: int, k: int) -> None:
    """Scales that bf16 does not hold, as checkpoints have them; the bytes are those of whole blocks, and 4 a row for
    the sums of codes."""
    g = checks.generator(n, "cpu")
    codes = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    plain = kernels.QuantizedWeight("w8a8", codes, torch.rand(n, generator=g))
    weight = kernels.pack_weight(plain, "w8a8", device="cpu", layout="onednn8")
    back = weight.to_plain()
    assert back.codes.is_contiguous() and torch.equal(back.codes, codes)
    assert back.scale is not None and plain.scale is not None and torch.equal(back.scale, plain.scale)
    least = n * k + 8 * n
    assert weight.nbytes == least if n % 64 == 0 == k % 64 else least < weight.nbytes <= least + 64 * (n + k + 64 + 4)
    with pytest.raises(ValueError, match="'onednn8' does not keep rows together"):
        weight.rows(torch.tensor([0]), torch.float32)


def test_which_weights_onednn_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, where the CPU can; then 8-bit x at one row too, also for the reference's plain codes."""
    cpu, rows, k = torch.device("cpu"), ONEDNN8_FROM // 1024, 1024
    for able in (True, False):
        monkeypatch.setattr(packing, "has_packed_int8", lambda able=able: able)
        assert device_layout("w8a8", cpu, (rows, k)) == ("onednn8" if able else "int8pack")
        assert device_layout("w8a8", cpu, (rows - 1, k)) == "int8pack"
        assert device_layout("int8", cpu, (rows, k)) == "int8pack"
        assert device_layout("w8a8", torch.device("cuda"), (rows, k)) == "plain"
        for n, always in ((rows, able), (rows - 1, False)):
            plain = kernels.PackedWeight("w8a8", "plain", (n, k), torch.empty(n, k, dtype=torch.int8), torch.ones(n))
            assert codes_for(plain, 1) == (torch.int8 if always else None)
            assert codes_for(plain, SIXTEEN_BIT_ROWS + 1) == torch.int8


@needs_packed_int8
def test_a_row_is_multiplied_alike_in_every_batch() -> None:
    """Also where the operation before it rounds."""
    weight = kernels.pack_weight(checks.normal((2048, 1024), 1, "cpu") * 0.05, "w8a8", device="cpu")
    assert weight.layout == "onednn8"
    x, scales = checks.normal((64, 1024), 2, "cpu"), checks.normal((1024,), 3, "cpu")
    for make in (lambda x: x, lambda x: kernels.normed(x, scales, 1e-5, weight)):
        many = kernels.linear(make(x), weight)
        for m in (1, 3, 16, 17):
            assert torch.equal(kernels.linear(make(x[:m]), weight), many[:m])


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("m", [1, 64, 65, 100, 256, 1000])
@pytest.mark.parametrize("n, k", [(192, 256), (100, 384)])
def test_4_bit_weights(m: int, n: int, k: int, group_size: int, impl: str) -> None:
    checks.check_linear(m, n, k, "w4a8", "cpu", impl=impl, bias=m in (64, 65), group_size=group_size)


@pytest.mark.parametrize("format", ["w8a8", "fp8", "w4a8"])
@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_rows_that_are_not_finite(format: str, impl: str) -> None:
    checks.check_broken_rows(70, format, "cpu", impl=impl)


@needs_packed_int8
@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_rows_that_are_not_finite_by_onednn(m: int, impl: str) -> None:
    checks.check_broken_rows(m, "w8a8", "cpu", impl=impl, layout="onednn8")


def test_the_int8_form_of_4_bits() -> None:
    """Against float64, code by code: half a step of the channel away at most, but for the ratio's own rounding; the
    largest that a group can say takes 127, whichever side of its zero that is."""
    for zero, largest in ((0, 15), (15, 0), (7, 15), (8, 0)):
        codes = torch.arange(128, dtype=torch.uint8).view(1, -1) % 16
        scale, zeros = torch.tensor([[0.02, 0.0004]]), torch.tensor([[zero, zero]], dtype=torch.uint8)
        weight = kernels.QuantizedWeight("w4a8", codes, scale, zeros, 64)
        eight = weight.requantized()
        assert eight.scale is not None and eight.codes.dtype == torch.int8
        error = (eight.dequantize(torch.float64) - weight.dequantize(torch.float64)).abs()
        assert (error <= eight.scale.double() * (0.5 + 127 * 2**-11)).all() and error.max() > 0
        assert eight.codes[0, largest].abs() == 127 == eight.codes.abs().max()
        assert (eight.codes[codes == zero] == 0).all()  # no weight of zero becomes another
        exact = (codes[:, :64].double() - zero) * (scale[:, :1] / eight.scale[:, None]).half().double()
        assert torch.equal(eight.codes[:, :64].double(), exact.round())


@pytest.mark.parametrize("layout", ["planes", "int4pack"])
def test_rows_of_zeros_have_an_int8_form(layout: str) -> None:
    weight = checks.any_4_bit(72, 256, 64, "cpu")
    assert weight.scale is not None
    packed = kernels.pack_weight(weight, "w4a8", device="cpu", layout=layout)
    assert packed.channel is not None and (packed.channel > 0).all() and packed.channel.isfinite().all()
    dead = (weight.scale == 0).all(1)
    assert dead.sum() == 1 and (packed.to_plain().requantized().codes[dead] == 0).all()
    assert packed.nbytes - replace(packed, channel=None).nbytes == packed.channel.nbytes
    assert torch.equal(packed.channel[:72], kernels.formats.weights.channel_scales(weight.scale, weight.zero))


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_columns_in_activation_order(impl: str) -> None:
    """Codes of x from the operation before come in the order of the features, and so do those that `linear` makes."""
    dense = torch.randn(72, 256)
    order = torch.randperm(256)
    plain = kernels.quantize_weight(dense[:, order], "w4a8", 64)
    weight = kernels.pack_weight(replace(plain, order=order), "w4a8", device="cpu")
    x = torch.randn(80, 256).bfloat16()
    eight = quantize_rows(x, torch.int8)
    want = eight.dequantize(torch.float64) @ checks.multiplied(weight, torch.int8).t()
    for given in (x, eight):
        assert checks.relative_error(kernels.linear(given, weight, impl=impl), want) < 4e-3
    assert checks.relative_error(weight.dequantize(), dense) < 0.15


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m", [3, 40, 100])
def test_linear_integers_exact(format: str, m: int, impl: str) -> None:
    checks.check_linear_exact(m, 80, 256, format, "cpu", impl=impl)


@needs_packed_int8
@pytest.mark.parametrize("m", [1, 3, 40])
def test_integers_by_onednn_exact(m: int) -> None:
    checks.check_linear_exact(m, 80, 256, "w8a8", "cpu", impl="aten", layout="onednn8")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("rows, width", [(6, 300), (1, 64)])
def test_quantize_rows(rows: int, width: int, codes: torch.dtype) -> None:
    checks.check_quantize(rows, width, codes, "cpu", impl="aten")


@pytest.mark.parametrize("codes", CODES)
def test_fused(codes: torch.dtype) -> None:
    checks.check_fused(6, 300, codes, "cpu", impl="aten")


@pytest.mark.parametrize("format", kernels.WEIGHT_FORMATS)
def test_one_function_decides(format: str) -> None:
    eight = kernels.WEIGHT_FORMATS[format].activations
    few = {"w8a8": 16, "fp8": 16, "w4a8": 64}.get(format)
    assert (eight is not None) == (few is not None)
    assert activation_codes(format, few or 1) is None
    assert activation_codes(format, (few or 1 << 20) + 1) == eight


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
def test_a_product_with_codes_from_the_operation_before(format: str) -> None:
    """Three dimensions, and what `linear` makes itself of the same numbers."""
    weight = kernels.pack_weight(torch.randn(48, 64), format, device="cpu")
    x = torch.randn(SIXTEEN_BIT_ROWS, 2, 64).bfloat16()
    codes = kernels.WEIGHT_FORMATS[format].activations
    assert codes is not None
    for impl in ("aten", "torch"):
        got = kernels.linear(quantize_rows(x, codes, impl=impl), weight, impl=impl)
        assert got.shape == (SIXTEEN_BIT_ROWS, 2, 48) and torch.equal(got, kernels.linear(x, weight, impl=impl))


def test_w8a8_holds_the_codes_of_int8() -> None:
    dense = torch.randn(40, 64)
    int8, w8a8 = (kernels.quantize_weight(dense, format) for format in ("int8", "w8a8"))
    assert torch.equal(int8.codes, w8a8.codes) and int8.scale is not None and w8a8.scale is not None
    assert torch.equal(int8.scale, w8a8.scale)
    packed = kernels.pack_weight(dense, "w8a8", device="cpu")
    x = torch.randn(SIXTEEN_BIT_ROWS, 64).bfloat16()
    assert torch.equal(kernels.linear(x, packed), kernels.linear(x, kernels.pack_weight(dense, "int8", device="cpu")))


def test_fp8_weights_keep_to_half_a_step() -> None:
    dense = torch.randn(40, 64)
    dense[0] = 0
    dense[1, 5] = 1e4
    held = kernels.quantize_weight(dense, "fp8")
    assert held.codes.dtype == torch.float8_e4m3fn and held.scale is not None and held.scale.dtype == torch.float32
    error = (held.dequantize(torch.float64) - dense.double()).abs()
    assert (error <= dense.double().abs() / 16 + held.scale.double()[:, None] * 2**-10 * 1.001).all()
    assert held.codes.float().abs().amax(1)[1:].eq(448).all()


def test_every_e4m3_number_is_widened_exactly() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = numbers[numbers.float().isfinite()]
    assert len(finite) == 254 and torch.equal(widen_e4m3(finite).float(), finite.float())


def test_float64_stays_float64() -> None:
    weight = kernels.pack_weight(torch.randn(32, 64), "w8a8", device="cpu")
    x = torch.randn(SIXTEEN_BIT_ROWS + 4, 64, dtype=torch.float64)
    held = quantize_rows(x, torch.int8).dequantize()
    want = held @ weight.dequantize(torch.float64).t()
    assert torch.allclose(kernels.linear(x, weight, impl="torch"), want, rtol=0, atol=1e-12)


def test_a_gpu_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"fp8 needs.* this one has 8\.0; w8a8"):
        kernels.pack_weight(torch.randn(16, 16), "fp8", device="cuda")


def eight(codes: torch.dtype = torch.int8) -> Activations:
    return quantize_rows(torch.randn(2, 64).bfloat16(), codes)


def packed(format: str) -> kernels.PackedWeight:
    return kernels.pack_weight(torch.randn(64, 64), format, group_size=64, device="cpu")


BAD = [
    (lambda: kernels.linear(eight(), packed("fp8")), "torch.int8 do not go with weights of fp8"),
    (lambda: kernels.linear(eight(), packed("int4")), "torch.int8 do not go with weights of int4"),
    (lambda: kernels.linear(eight(torch.float8_e4m3fn), packed("w4a8")), "e4m3fn do not go with weights of w4a8"),
    (lambda: kernels.linear(eight(), packed("int8")), "torch.int8 do not go with weights of int8"),
    (lambda: kernels.linear(eight(), packed("w8a8"), impl="triton"), "needs CUDA tensors"),
    (lambda: quantize_rows(torch.randn(2, 4), torch.uint8), "torch.int8.*not torch.uint8"),
    (lambda: quantized_silu_mul(torch.randn(2, 5), torch.int8), "5 is odd"),
    (lambda: kernels.quantize_weight(torch.randn(4, 72), "w8a8"), "w8a8 must be a multiple of 16, 72 is not"),
    (lambda: kernels.quantize_weight(torch.randn(4, 72), "fp8"), "fp8 must be a multiple of 16, 72 is not"),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()

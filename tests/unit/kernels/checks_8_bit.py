"""Checks of products with 8-bit activations, of what makes those, and of fp8 weights, on any device (as `checks`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels.rows import elementwise, rounding
from kernels.rows.activations import Activations, codes_for
from kernels.rows.rounding import quantize_rows
from kernels.tuning import HopperConfig, SkinnyConfig, WideConfig
from tests.unit.kernels.checks import generator, normal, poison, relative_error

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
CODES = {"w8a8": INT8, "fp8": E4M3, "w4a8": INT8}
SIXTEEN_BIT_ROWS = kernels.WEIGHT_FORMATS["w8a8"].sixteen_bit_rows


def multiplied(weight: kernels.PackedWeight, codes: torch.dtype | None) -> Tensor:
    """The float64 weight [N, K] that activations in `codes` are multiplied by."""
    plain = weight.to_plain()
    return (plain if codes is None or plain.zero is None else plain.requantized()).dequantize(torch.float64)


def check_linear(
    m: int, n: int, k: int, format: str, device: str, *, impl: str, layout: str | None = None, bias: bool = False,
    group_size: int = 128,
) -> None:
    """Against the float64 product of what both sides stand for, activations rounded by the reference where `linear`
    rounds them."""
    dense = normal((n, k), 1, device).float() * 0.05 + 0.01
    weight = kernels.pack_weight(dense, format, group_size=group_size, device=device, layout=layout)
    x = normal((m, k), m, device)
    x[1:2] = 0
    b = normal((n,), 3, device) if bias else None
    codes = codes_for(weight, m)
    held = x.double() if codes is None else quantize_rows(x, codes, impl="torch").dequantize(torch.float64)
    rounds_always = weight.layout == "onednn8"
    assert (codes is None) == (m <= kernels.WEIGHT_FORMATS[format].sixteen_bit_rows and not rounds_always)
    poison(device)
    got = kernels.linear(x, weight, b, impl=impl)
    want = held @ multiplied(weight, codes).t() + (0 if b is None else b.double())
    assert got.shape == (m, n) and got.dtype == torch.bfloat16
    rounded_twice = bias or (impl == "torch" and codes is not None)  # before the bias; what the codes stand for
    bound = 6e-3 if rounded_twice else 4e-3
    error = relative_error(got, want)
    assert error < bound, f"{format} M={m} N={n} K={k}: relative error {error:.2e}"


def check_linear_exact(
    m: int, n: int, k: int, format: str, device: str, *, impl: str, layout: str | None = None
) -> None:
    """Whole numbers that the codes hold, scales of 1, a bias, and sums that bf16 holds: every bit must be right."""
    g = generator(m * n, device)
    dense = torch.randint(-7, 8, (n, k), generator=g, device=device)
    data = dense.to(CODES[format])
    plain = kernels.QuantizedWeight(format, data, torch.ones(n, device=device))
    weight = kernels.pack_weight(plain, format, device=device, layout=layout)
    x = torch.zeros(m, k, device=device)
    at = torch.randint(0, k, (m, 16), generator=g, device=device)
    x.scatter_(1, at, torch.randint(-1, 2, (m, 16), generator=g, device=device).float())
    bias = torch.randint(-9, 10, (n,), generator=g, device=device).bfloat16()
    poison(device)
    eight = Activations(x.to(CODES[format]), torch.ones(m, device=device), torch.bfloat16)
    want = x.double() @ dense.double().t() + bias.double()
    assert want.abs().max() <= 256
    for given in (eight, x.bfloat16()) if codes_for(weight, m) is None else (eight,):
        got = kernels.linear(given, weight, bias, impl=impl)
        assert torch.equal(got.double(), want), f"{format} M={m} N={n} K={k}: {(got.double() != want).sum()} differ"


def check_pairs_exact(m: int, n: int, k: int, device: str, config: SkinnyConfig | HopperConfig) -> None:
    """All int8 codes and whole numbers in x, so few that float32 holds every sum, with scales that are powers of two:
    every bit of every sum of partials must be right."""
    from kernels.products.matmul_triton import linear_partials

    g = generator(m * n, device)
    codes = torch.randint(-128, 128, (n, k), generator=g, device=device).to(INT8)
    scale = 2.0 ** torch.randint(-3, 3, (n,), generator=g, device=device)
    weight = kernels.pack_weight(kernels.QuantizedWeight("int8", codes, scale), "int8", device=device, layout="pairs")
    x = torch.randint(-4, 5, (m, k), generator=g, device=device).bfloat16()
    x = torch.cat((x, torch.full((256, k), float("nan"), dtype=x.dtype, device=device)))[:m]  # NaN behind it
    poison(device)
    parts = linear_partials(x, weight, config)
    want = (x.double() @ codes.double().t()) * scale.double()
    want = want.bfloat16().double() if len(parts) == 1 else want
    assert parts.dtype == (torch.bfloat16 if len(parts) == 1 else torch.float32)
    wrong = int((parts.double().sum(0) != want).sum())
    assert wrong == 0, f"{config} M={m} N={n} K={k}: {wrong} of {want.numel()} elements differ"


def check_every_word(device: str, rows: tuple[int, ...]) -> None:
    """Both codes of each of the 65,536 words, widened, and as products of so many unit vectors at a time give them."""
    from kernels.products.skinny import widen_rows

    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device).to(torch.int16).view(1024, 64)
    scale = torch.ones(1024, dtype=torch.bfloat16, device=device)
    weight = kernels.PackedWeight("int8", "pairs", (1024, 128), words, scale)
    held = words.view(torch.int8).view(1024, 64, 2)
    want = torch.cat((held[:, :, 0], held[:, :, 1]), 1).bfloat16()
    assert torch.equal(weight.to_plain().codes.bfloat16(), want)
    out = torch.full((1024, 128), float("nan"), dtype=torch.bfloat16, device=device)
    widen_rows(weight, 0, out)
    assert torch.equal(out, want)
    for many in rows:
        eye = torch.eye(128, device=device).bfloat16()
        got = [kernels.linear(part, weight, impl="triton") for part in eye.split(many)]
        assert torch.equal(torch.cat(got).t(), want)


def any_4_bit(n: int, k: int, group_size: int, device: str) -> kernels.QuantizedWeight:
    """All codes, zeros at both ends and between, scales a hundredfold apart, one row of zeros."""
    g = generator(n, device)
    codes, zero = (
        torch.randint(0, 16, shape, generator=g, device=device, dtype=torch.uint8)
        for shape in ((n, k), (n, k // group_size))
    )
    zero[: n // 3], zero[n // 3 : n // 2] = 0, 15
    scale = (torch.rand(n, k // group_size, generator=g, device=device) * 0.02 + 2e-4).bfloat16().float()
    scale[n // 2] = 0
    return kernels.QuantizedWeight("w4a8", codes, scale, zero, group_size)


def any_codes(m: int, k: int, device: str) -> Activations:
    g = generator(m, device)
    codes = torch.randint(-127, 128, (m, k), generator=g, device=device).to(INT8)
    return Activations(codes, torch.rand(m, generator=g, device=device) * 0.01, torch.bfloat16)


def scaled_sums(x: Activations, weight: kernels.QuantizedWeight, columns: slice) -> Tensor:
    """What a kernel makes of the exact sums over `columns` of K, operation by operation in float32."""
    assert weight.scale is not None
    sums = x.codes[:, columns].double() @ weight.codes[:, columns].double().t()
    return sums.float() * x.scale[:, None] * weight.scale


def check_a8w4_exact(m: int, n: int, k: int, group_size: int, device: str, config: WideConfig | None = None) -> None:
    """The int8 form of a 4-bit weight and sums in int32: every bit of every partial must be right."""
    from kernels.products.a8w4 import a8w4_partials

    plain, x = any_4_bit(n, k, group_size, device), any_codes(m, k, device)
    weight = kernels.pack_weight(plain, "w4a8", device=device, layout="planes")
    poison(device)
    got = a8w4_partials(x, weight, config)
    eight, groups = plain.requantized(), k // group_size
    assert eight.codes.abs().max() == 127
    step = -(-groups // (config.splits if config else got.shape[0])) * group_size
    for split, part in enumerate(got):
        want = scaled_sums(x, eight, slice(split * step, (split + 1) * step)).to(part.dtype)
        assert torch.equal(part, want), f"{config} M={m} N={n} K={k} split {split}: {(part != want).sum()} differ"
    assert got.shape[0] == -(-k // step) and got.dtype == (torch.float32 if len(got) > 1 else torch.bfloat16)


def check_requantized_once(m: int, n: int, k: int, group_size: int, device: str, elements: int) -> None:
    """The int8 form written out, and the product of slices of so many elements."""
    from kernels.products import a8w4, matmul_triton

    plain, x = any_4_bit(n, k, group_size, device), any_codes(m, k, device)
    weight = kernels.pack_weight(plain, "w4a8", device=device, layout="planes")
    eight = plain.requantized()
    for first, count in ((0, n), (64, n - 70)):
        codes = torch.full((count, k), -128, dtype=INT8, device=device)
        a8w4.requantize_rows(weight, first, codes)
        assert torch.equal(codes, eight.codes[first : first + count])
    poison(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_triton, "REQUANTIZED_ELEMENTS", elements)
        got = matmul_triton.requantized_once(x, weight)
    assert torch.equal(got, scaled_sums(x, eight, slice(None)).bfloat16())


def check_broken_rows(m: int, format: str, device: str, *, impl: str, layout: str | None = None) -> None:
    """A row of x that is not finite gives no finite products, and leaves the others alone."""
    weight = kernels.pack_weight(normal((96, 256), 1, device) * 0.05, format, device=device, layout=layout)
    x = normal((m, 256), m, device)
    want = kernels.linear(x, weight, impl=impl)
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[-1, 7] = value
        got = kernels.linear(broken, weight, impl=impl)
        assert not got[-1].isfinite().any() and torch.equal(got[:-1], want[:-1])


def check_splits(m: int, n: int, k: int, format: str, device: str) -> None:
    """Every number of splits, one of which leaves an uneven rest, gives the product."""
    from kernels.products.matmul_triton import linear_8_bit

    weight = kernels.pack_weight(normal((n, k), 1, device) * 0.05, format, device=device, layout="plain")
    x = quantize_rows(normal((m, k), m, device), CODES[format], impl="torch")
    want = x.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    for splits in (1, 2, 3):
        poison(device)
        got = linear_8_bit(x, weight, None, WideConfig(32, 32, splits, 4, 2, 64))
        assert relative_error(got, want) < 3e-3, f"{splits} splits"


def rows_like_any(rows: int, width: int, device: str) -> Tensor:
    """Ordinary rows, and where there are enough of them: zeros, halves of a code, one outlier, next to nothing."""
    x = normal((rows, width), rows, device)
    if rows >= 5:
        x[0] = 0
        x[1] = torch.arange(width, device=device) % 255 * 0.5 - 63.5  # every half is a tie
        x[1, 0] = 127
        x[2, -1] = 3e4
        x[3] = 1e-35
    return x


def same_codes(got: Activations, want: Activations, share: float = 0.0) -> None:
    """The same codes and scales; `share` of the codes may be neighbours, where results lie at the edge between two."""
    assert got.codes.dtype == want.codes.dtype and got.scale.dtype == torch.float32
    assert got.shape == want.shape and got.scale.shape == want.shape[:-1]
    assert torch.allclose(got.scale, want.scale, rtol=1e-5 if share else 0, atol=0)
    differ = got.codes.float() != want.codes.float()
    assert differ.float().mean() <= share, f"{differ.sum()} of {differ.numel()} codes differ"
    if share:
        step = (got.codes.float() - want.codes.float()).abs()
        bound = 1.0 if want.codes.dtype == INT8 else want.codes.float().abs() / 7 + 2**-9
        assert (step <= bound).all()


def check_quantize(rows: int, width: int, codes: torch.dtype, device: str, *, impl: str) -> None:
    """Bit for bit the reference, which keeps to half a step of x; a row that is not finite says so in its scale."""
    x = rows_like_any(rows, width, device)
    poison(device)
    got, want = (quantize_rows(x, codes, impl=how) for how in (impl, "torch"))
    same_codes(got, want)
    largest = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    step = largest / 254 if codes == INT8 else x.double().abs() / 16 + largest / 448 * 2**-10
    assert ((got.dequantize(torch.float64) - x.double()).abs() <= step * (1 + 1e-5)).all()
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[-1, width // 2] = value
        found = quantize_rows(broken, codes, impl=impl)
        assert not found.scale[-1].isfinite() and torch.equal(found.codes.view(torch.uint8)[:-1],
                                                              got.codes.view(torch.uint8)[:-1])


def check_fused(rows: int, width: int, codes: torch.dtype, device: str, *, impl: str) -> None:
    """Norms and SiLU-mul that emit codes: those of their float64 results, but for results at the edge of a code."""
    x, residual = rows_like_any(rows, width, device), normal((rows, width), 2, device)
    weight = normal((width,), 3, device)
    wide = (x + residual).double()
    gate_up = torch.cat((rows_like_any(rows, width, device), normal((rows, width), 4, device)), -1)
    gate_up[:, :3] = torch.tensor([-200.0, 200.0, -3e4], device=device)

    def quantized(result: Tensor) -> Activations:
        found = quantize_rows(result, codes, impl="torch")
        return Activations(found.codes, found.scale.float(), torch.bfloat16)

    def norm(x: Tensor) -> Tensor:
        return elementwise.rms_norm(x.double(), weight.double(), 1e-5, impl="torch")

    runs: list[tuple[Callable[[], Activations], Tensor]] = [
        (lambda: rounding.quantized_rms_norm(x, weight, 1e-5, codes, impl=impl), norm(x)),
        (lambda: rounding.quantized_silu_mul(gate_up, codes, impl=impl),
         elementwise.silu_mul(gate_up.double(), impl="torch")),
    ]  # fmt: skip
    for run, result in runs:
        poison(device)
        same_codes(run(), quantized(result), share=1e-3)
    poison(device)
    got, total = rounding.quantized_add_rms_norm(x, residual, weight, 1e-5, codes, impl=impl)
    assert torch.equal(total, x + residual)
    same_codes(got, quantized(norm(wide)), share=1e-3)
    for splits in (2, 5):  # float32 partials, as a product whose K is split leaves them
        parts = torch.randn(splits, rows, 2 * width, generator=generator(splits, device), device=device)
        poison(device)
        got = rounding.quantized_silu_mul(parts, codes, impl=impl)
        same_codes(got, quantized(elementwise.silu_mul(parts.double().sum(0), impl="torch")), share=2e-3)
        got, total = rounding.quantized_add_rms_norm(parts[..., :width].contiguous(), residual, weight, 1e-5, codes,
                                                        impl=impl)  # fmt: skip
        assert got.dtype == total.dtype == torch.bfloat16
        assert relative_error(total, parts[..., :width].double().sum(0) + residual.double()) < 3e-3
        same_codes(got, quantized(norm(total)), share=1e-3)

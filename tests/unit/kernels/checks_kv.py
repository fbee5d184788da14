"""Checks of the KV codecs: the bits of one encoded row, saturation, and integers that come through exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from kernels.paged.kv_cache import Codec, decode, encode
from kernels.paged.kv_cache_triton import encode_rows
from kernels.triton_common import INTERP
from tests.unit.kernels.checks import attention64, fill_cache, generator, poison, relative_error

CODECS = {codec.name: codec for form in kernels.KV_FORMATS.values() for codec in (form.key, form.value)}


@triton.jit
def encode_kernel(
    x, words, scales, CODE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """One program per ROWS rows of x [rows, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    values = tl.load(x + row[:, None] * D + tl.arange(0, D)[None, :]).to(tl.float32)
    word, scale = encode_rows(values, CODE, ROWS, D, INTERP)
    tl.store(words + row[:, None] * W + tl.arange(0, W)[None, :], word)
    tl.store(scales + row, scale)


def encode_triton(x: Tensor, codec: Codec, rows: int) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    words = torch.empty(n, codec.words(d), dtype=torch.bfloat16 if codec.bits == 16 else torch.int16, device=x.device)
    scales = torch.empty(n, dtype=torch.int32, device=x.device)
    encode_kernel[(n // rows,)](x, words, scales, codec.name, rows, d, codec.words(d), INTERP)
    return words, scales


def rows_of_all_sizes(head_dim: int, device: str) -> Tensor:
    """bf16 [32, D]: rows of magnitudes 1e-30 to 1e30, constant and zero ones, one outlier, ties, one sign only."""
    x = torch.randn(32, head_dim, generator=generator(3, device), device=device)
    x = x * 10.0 ** torch.linspace(-30, 30, 32, device=device)[:, None]
    x[3], x[4], x[5] = 0, 3.25, -7
    x[6, 1] = 3e4
    x[7] = torch.arange(head_dim, device=device) / 16 - 2
    x[8] = x[8].abs()
    return x.bfloat16()


def check_encode(name: str, rows: int, head_dim: int, device: str) -> None:
    """The same bits as the reference, a row or several at a time."""
    x = rows_of_all_sizes(head_dim, device)
    words, scales = encode_triton(x, CODECS[name], rows)
    want_words, want_scales = encode(x, CODECS[name])
    assert torch.equal(words, want_words), f"{name}: {(words != want_words).sum().item()} words differ"
    assert want_scales is None or torch.equal(scales, want_scales)


def check_e4m3(device: str) -> None:
    """Every bf16 number within the range of a row, each sign, and infinity: nearest even, saturated, never NaN."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    within = every[every.abs() <= 448]
    x = torch.full((16 * (len(within) // (16 * 63) + 1), 64), 448.0, device=device).bfloat16()  # 448: a scale of 1
    x[:, 1:] = torch.nn.functional.pad(within, (0, x.shape[0] * 63 - len(within))).view(-1, 63)
    words, scales = encode_triton(x, CODECS["fp8"], 16)
    assert (scales == 0x3F800000).all()
    assert torch.equal(decode(words, scales, CODECS["fp8"]), x.float().to(torch.float8_e4m3fn).float())
    huge = torch.tensor([[float("inf"), -3e38, 1e38, 1.0] * 16, [-float("inf")] * 64], device=device).bfloat16()
    for words, scales in (encode_triton(huge, CODECS["fp8"], 1), encode(huge, CODECS["fp8"])):
        assert scales is not None
        held = decode(words, scales, CODECS["fp8"])
        assert held.isfinite().all() and (held.abs().amax(-1) > 2.5e38).all() and (held[1] < 0).all()
    lost = huge.clone()
    lost[0, 3] = float("nan")
    assert decode(*encode_triton(lost, CODECS["fp8"], 1), CODECS["fp8"])[0, 3].isnan()


def check_exact(format: str, block_size: int, head_dim: int, device: str, *, impl: str, order: str | None) -> None:
    """Keys that single out one token, and values that the codes hold exactly: every bit of the answer is that token's.

    Integer codes hold whole numbers from 0 to their largest, fp8 and bf16 those of four bits and a sign."""
    chosen, length = kernels.KV_FORMATS[format], 100
    cache = fill_cache(format, [length], block_size, 1, head_dim, device, order=order)
    g = generator(4, device)
    top = {"bf16": 8, "fp8": 8, "int8": 255, "int4": 15}
    on = torch.randint(0, 2, (length, 1, head_dim), generator=g, device=device)
    on[:, :, 0], on[:, :, 1] = 0, 1
    low = 0 if chosen.value.name.startswith("int") else -15
    most = top[chosen.value.name] if low == 0 else 15
    values = torch.randint(low, most + 1, (length, 1, head_dim), generator=g, device=device)
    values[:, :, 2], values[:, :, 3] = low, most
    at = torch.arange(length, device=device)
    slots = cache.tables[0].long()[at // block_size] * block_size + at % block_size
    kernels.write_kv(cache.layer, (on * top[chosen.key.name]).bfloat16(), values.bfloat16(), slots, impl="torch")
    for token in (0, 37, length - 1):
        q = (2 * on[token] - 1).bfloat16()[None]
        poison(device)
        got = kernels.decode_attention(q, cache.layer, cache.tables, cache.lengths, 1.0, impl=impl)
        assert torch.equal(got[0].double(), values[token].double()), f"{format}: token {token} differs"


def check_outlier_channel(format: str, lengths: list[int], head_dim: int, device: str, *, impl: str) -> None:
    """Keys with one channel far from zero, as trained models have them: all scores share a part that softmax takes out,
    and what is left must not have been rounded away beside it."""
    cache = fill_cache(format, lengths, 16, 2, head_dim, device)
    g = generator(8, device)
    q = torch.randn(len(lengths), 6, head_dim, generator=g, device=device)
    q[..., 3] += 10
    for b, n in enumerate(lengths):
        k = torch.randn(n, 2, head_dim, generator=g, device=device)
        k[..., 3] += 100
        v = torch.randn(n, 2, head_dim, generator=g, device=device).bfloat16()
        at = torch.arange(n, device=device)
        kernels.write_kv(cache.layer, k.bfloat16(), v, cache.tables[b].long()[at // 16] * 16 + at % 16, impl=impl)
    poison(device)
    got = kernels.decode_attention(q.bfloat16(), cache.layer, cache.tables, cache.lengths, head_dim**-0.5, impl=impl)
    for b, n in enumerate(lengths):
        held_k, held_v = (x.double() for x in kernels.read_kv(cache.layer, cache.tables[b], n))
        error = relative_error(got[b : b + 1], attention64(q[b : b + 1].bfloat16(), held_k, held_v, head_dim**-0.5))
        bound = 2.5e-2 if format == "fp8" else 1.5e-2  # three bits beside 100 leave the scores of fp8 far apart
        assert error < (bound if impl == "aten" else 8e-3), f"{format} length {n}: relative error {error:.2e}"


def check_constant(format: str, block_size: int, head_dim: int, device: str, *, impl: str, order: str | None) -> None:
    """Vectors without a range (zero keys and values, constant ones) leave the small ones beside them as exact as they
    are, and a head of nothing but zero values gives zeros."""
    length, g = 100, generator(6, device)
    cache = fill_cache(format, [length], block_size, 2, head_dim, device, order=order)
    k, v = (0.02 * torch.randn(length, 2, head_dim, generator=g, device=device) for _ in range(2))
    k[:5], k[7], v[3], v[4] = 0, 0.01, 0, -0.01
    v[:, 1] = 0
    at = torch.arange(length, device=device)
    slots = cache.tables[0].long()[at // block_size] * block_size + at % block_size
    kernels.write_kv(cache.layer, k.bfloat16(), v.bfloat16(), slots, impl=impl)
    held_k, held_v = (x.double() for x in kernels.read_kv(cache.layer, cache.tables[0], length))
    q = 4 * torch.randn(1, 4, head_dim, generator=g, device=device).bfloat16()
    poison(device)
    got = kernels.decode_attention(q, cache.layer, cache.tables, cache.lengths, head_dim**-0.5, impl=impl)
    want = attention64(q, held_k, held_v, head_dim**-0.5)
    error = relative_error(got[:, :2], want[:, :2])
    assert error < (1.5e-2 if impl == "aten" else 8e-3), f"{format}: relative error {error:.2e}"
    assert got[:, 2:].abs().max() < 1e-12, f"{format}: zero values give {got[:, 2:].abs().max().item():.1e}"

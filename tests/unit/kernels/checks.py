"""What every implementation of an operation must satisfy, on any device: the interpreter's tests and the GPU's call
these.

Each check draws fresh inputs from a seed, poisons what an operation might forget to write, and compares with float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN if got holds any."""
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def generator(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed, device), device=device).bfloat16()


def packed(weight: Tensor, format: str, group_size: int, device: str, layout: str | None) -> kernels.PackedWeight:
    return kernels.pack_weight(weight, format, group_size=group_size, device=device, layout=layout)


def poison(device: str, nbytes: int = 1 << 22) -> None:
    """Leave NaN in memory that the allocator will hand out next, so that an element nobody writes is seen."""
    for size in (1 << 12, 1 << 16, 1 << 20, nbytes):
        torch.full((size // 4,), float("nan"), device=device)


def check_linear(
    m: int, n: int, k: int, format: str, group_size: int, device: str, *, impl: str, layout: str | None = None,
    bias: bool = False,
) -> None:
    weight = packed(normal((n, k), 1, device).float() * 0.05 + 0.01, format, group_size, device, layout)
    x = normal((m, k), m, device)
    b = normal((n,), 3, device) if bias else None
    poison(device)
    got = kernels.linear(x, weight, b, impl=impl)
    want = x.double() @ weight.dequantize(torch.float64).t() + (0 if b is None else b.double())
    assert got.shape == (m, n) and got.dtype == torch.bfloat16
    error = relative_error(got, want)
    assert error < 4e-3, f"{format} M={m} N={n} K={k} g{group_size}: relative error {error:.2e}"


def check_linear_exact(
    m: int, n: int, k: int, format: str, group_size: int, device: str, *, impl: str, layout: str | None = None
) -> None:
    """Integer-valued inputs whose products and sums are exact in float32: the result must be bit-exact."""
    g = generator(m * n, device)
    codes = torch.randint(-7, 8, (n, k), generator=g, device=device)
    if format == "int4":
        plain = kernels.QuantizedWeight(
            "int4",
            (codes + 7).to(torch.uint8),
            torch.ones(n, k // group_size, device=device),
            torch.full((n, k // group_size), 7, dtype=torch.uint8, device=device),
            group_size,
        )
    elif format == "int8":
        plain = kernels.QuantizedWeight("int8", codes.to(torch.int8), torch.ones(n, device=device))
    else:
        plain = kernels.QuantizedWeight("bf16", codes.bfloat16())
    weight = kernels.pack_weight(plain, format, device=device, layout=layout)
    x = torch.zeros(m, k, device=device)
    chosen = torch.randint(
        0, k, (m, 16), generator=g, device=device
    )  # few live inputs keep every sum within bf16's 8 bits
    x.scatter_(1, chosen, torch.randint(-1, 2, (m, 16), generator=g, device=device).float())
    got = kernels.linear(x.bfloat16(), weight, impl=impl)
    want = x.double() @ codes.double().t()
    assert want.abs().max() <= 256
    assert torch.equal(got.double(), want), (
        f"{format} M={m} N={n} K={k}: {(got.double() != want).sum().item()} elements differ"
    )


@dataclass
class Cache:
    """A filled cache: sequences of the given lengths in shuffled blocks, everything outside them poisoned."""

    layer: kernels.KVLayer
    tables: Tensor
    lengths: Tensor
    keys: list[Tensor]  # float64 [L, Hkv, D], as the format holds them
    values: list[Tensor]


def poison_layer(layer: kernels.KVLayer) -> None:
    for t in (layer.key, layer.value):
        t.fill_(float("nan") if t.dtype == torch.bfloat16 else -1)
    for scales in (layer.key_scale, layer.value_scale):
        if scales is not None:
            scales.fill_(0x7FC07FC0)  # a NaN scale and a NaN low


def fill_cache(
    format: str, lengths: list[int], block_size: int, kv_heads: int, head_dim: int, device: str, *, impl: str = "torch",
    order: str | None = None,
) -> Cache:
    per_row = max(1, max(-(-n // block_size) for n in lengths)) + 1
    blocks = per_row * len(lengths) + 3
    layer = kernels.allocate_kv(format, blocks, block_size, kv_heads, head_dim, device, order)
    poison_layer(layer)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(7))[: per_row * len(lengths)].view(
        len(lengths), per_row
    )
    tables = torch.full_like(order, -1)
    for b, n in enumerate(lengths):
        held = -(-n // block_size)
        tables[b, :held] = order[b, :held]
    keys, values = [], []
    for b, n in enumerate(lengths):
        k = normal((n, kv_heads, head_dim), 10 + b, device) * 2 + 0.5
        v = normal((n, kv_heads, head_dim), 50 + b, device) - 0.25
        at = torch.arange(n)
        slots = (tables[b][at // block_size] * block_size + at % block_size).to(device)
        padded = torch.cat((slots, torch.tensor([-1], device=device)))
        pad = torch.full((1, kv_heads, head_dim), float("nan"), device=device, dtype=k.dtype)
        kernels.write_kv(layer, torch.cat((k, pad)), torch.cat((v, pad)), padded, impl=impl)
        held_k, held_v = kernels.read_kv(layer, tables[b].to(device), n)
        for held, given, codec in ((held_k, k, layer.format.key), (held_v, v, layer.format.value)):
            bound = {"bf16": 1e-6, "int8": 1e-2, "fp8": 3e-2, "int4": 0.15}[codec.name]
            assert n == 0 or relative_error(held, given) < bound, (
                f"{format}: stored as {codec.name} with relative error {relative_error(held, given):.2e}"
            )
        keys.append(held_k.double())
        values.append(held_v.double())
    return Cache(layer, tables.int().to(device), torch.tensor(lengths, dtype=torch.int32, device=device), keys, values)


def check_write(
    format: str, block_size: int, kv_heads: int, head_dim: int, device: str, *, impl: str, order: str | None = None
) -> None:
    """The same bits as the reference, for ordinary, constant, and huge vectors, a strided input and a padding row."""
    t = 6
    qkv = normal((t, 3 * kv_heads, head_dim), 8, device)
    k, v = qkv[:, :kv_heads], qkv[:, kv_heads : 2 * kv_heads]
    k[1] = 3.25  # no range
    k[2] = 0
    v[3, :, 0] = 3e4  # one outlier
    slots = torch.tensor([0, 5, block_size + 1, -1, 2 * block_size - 1, 2 * block_size], device=device)
    layers = []
    for how in (impl, "torch"):
        layer = kernels.allocate_kv(format, 3, block_size, kv_heads, head_dim, device, order)
        kernels.write_kv(layer, k, v, slots, impl=how)
        layers.append(layer)
    table = torch.arange(3, device=device)
    for got, want in zip(
        kernels.read_kv(layers[0], table, 3 * block_size), kernels.read_kv(layers[1], table, 3 * block_size),
        strict=True,
    ):
        assert torch.equal(got, want), f"{format}: {(got != want).sum().item()} elements differ"
    held, _ = kernels.read_kv(layers[0], table, 3 * block_size)
    assert (held[5] == 3.25).all() and (held[block_size + 1] == 0).all()
    assert (held[7:block_size] == 0).all()  # nothing else was touched


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """float64 causal attention of the last q.shape[0] tokens."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("thd,lhd->htl", q.double(), k) * scale
    s = s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1), float("-inf"))
    return torch.einsum("htl,lhd->thd", s.softmax(-1), v)


def check_decode(
    format: str, lengths: list[int], block_size: int, kv_heads: int, group: int, head_dim: int, device: str, *,
    impl: str, order: str | None = None,
) -> None:
    cache = fill_cache(format, lengths, block_size, kv_heads, head_dim, device, order=order)
    q = normal((len(lengths), kv_heads * group, head_dim), 5, device)
    poison(device)
    got = kernels.decode_attention(q, cache.layer, cache.tables, cache.lengths, head_dim**-0.5, impl=impl)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    plan = kernels.plan_attention(cache.layer, q.shape[1], cache.tables, starts, cache.lengths, len(lengths), impl=impl)
    poison(device)
    planned = kernels.decode_attention(q, cache.layer, cache.tables, cache.lengths, head_dim**-0.5, plan, impl=impl)
    assert torch.equal(planned, got), f"{format}: a plan changes the result"
    given = torch.full_like(q, float("nan"))
    into = kernels.decode_attention(
        q, cache.layer, cache.tables, cache.lengths, head_dim**-0.5, plan, out=given, impl=impl
    )
    assert into is given and torch.equal(into, got), f"{format}: written elsewhere, or something else"
    for b, n in enumerate(lengths):
        if n == 0:
            assert (got[b] == 0).all()
            continue
        want = attention64(q[b : b + 1], cache.keys[b], cache.values[b], head_dim**-0.5)
        error = relative_error(got[b : b + 1], want)
        bound = 1.5e-2 if impl == "aten" else 8e-3  # the CPU path rounds scores to bf16
        assert error < bound, f"{format} length {n}: relative error {error:.2e}"


def check_prefill(
    format: str, chunks: list[tuple[int, int]], block_size: int, kv_heads: int, group: int, head_dim: int, device: str,
    *, impl: str, padding: int = 2, order: str | None = None,
) -> None:
    """chunks: (new tokens, all tokens) of each sequence."""
    cache = fill_cache(format, [n for _, n in chunks], block_size, kv_heads, head_dim, device, order=order)
    starts = [0]
    for t, _ in chunks:
        starts.append(starts[-1] + t)
    q = normal((starts[-1] + padding, kv_heads * group, head_dim), 6, device)
    poison(device)
    got = kernels.prefill_attention(
        q, cache.layer, cache.tables, torch.tensor(starts, dtype=torch.int32, device=device), cache.lengths,
        head_dim**-0.5, impl=impl,
    )
    assert (got[starts[-1] :] == 0).all()
    given = torch.full_like(q, float("nan"))
    into = kernels.prefill_attention(
        q, cache.layer, cache.tables, torch.tensor(starts, dtype=torch.int32, device=device), cache.lengths,
        head_dim**-0.5, out=given, impl=impl,
    )
    assert into is given and torch.equal(into, got), f"{format}: written elsewhere, or something else"
    for b, (t, n) in enumerate(chunks):
        if t:
            want = attention64(q[starts[b] : starts[b + 1]], cache.keys[b], cache.values[b], head_dim**-0.5)
            error = relative_error(got[starts[b] : starts[b + 1]], want)
            assert error < 8e-3, f"{format} chunk {t} of {n}: relative error {error:.2e}"


def check_elementwise(
    rows: int, width: int, heads: int, kv_heads: int, head_dim: int, device: str, *, impl: str
) -> None:
    x, residual, weight = (
        normal((rows, width), 1, device), normal((rows, width), 2, device), normal((width,), 3, device),
    )
    poison(device)
    assert (
        relative_error(
            kernels.rms_norm(x, weight, 1e-5, impl=impl),
            kernels.rms_norm(x.double(), weight.double(), 1e-5, impl="torch"),
        )
        < 4e-3
    )
    faint = x * 2.0**-9  # so small that eps counts
    want = kernels.rms_norm(faint.double(), weight.double(), 1e-5, impl="torch")
    assert relative_error(kernels.rms_norm(faint, weight, 1e-5, impl=impl), want) < 4e-3
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5, impl=impl)
    assert torch.equal(total, x + residual)
    assert relative_error(normed, kernels.rms_norm(total.double(), weight.double(), 1e-5, impl="torch")) < 4e-3
    gate_up = normal((rows, 2 * width), 4, device)
    assert relative_error(kernels.silu_mul(gate_up, impl=impl), kernels.silu_mul(gate_up.double(), impl="torch")) < 4e-3
    qkv = normal((rows, heads + 2 * kv_heads, head_dim), 5, device)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    head_weight = normal((head_dim,), 6, device)
    want = kernels.rms_norm(q.double(), head_weight.double(), 1e-6, impl="torch")
    assert relative_error(kernels.rms_norm(q, head_weight, 1e-6, impl=impl), want) < 4e-3
    positions = torch.randint(0, 500, (rows,), generator=generator(9, device), device=device)
    angles = torch.outer(
        torch.arange(500, device=device), 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    )
    turn = kernels.rotation(positions, torch.cat((angles.cos(), angles.sin()), -1))
    for got, ref in zip(
        kernels.rope(q, k, turn, impl=impl),
        kernels.rope(q.double(), k.double(), turn.double(), impl="torch"),
        strict=True,
    ):
        assert relative_error(got, ref) < 4e-3

"""Checks of the operations between matrix products when they take split-K partials, and of `rope_write`."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from tests.unit.kernels.checks import generator, normal, poison, relative_error

BLOCK = 16


def partials(rows: int, width: int, splits: int, seed: int, device: str) -> Tensor:
    """float32 [splits, rows, width], or bf16 [rows, width] for one split."""
    if splits == 1:
        return normal((rows, width), seed, device)
    return torch.randn(splits, rows, width, generator=generator(seed, device), device=device)


def whole(x: Tensor) -> Tensor:
    return x.double() if x.dim() == 2 else x.double().sum(0)


def check_consumers(rows: int, width: int, splits: int, device: str, *, impl: str) -> None:
    """add_rms_norm and silu_mul of partials against float64."""
    x, residual, weight = (
        partials(rows, width, splits, 1, device), normal((rows, width), 2, device), normal((width,), 3, device),
    )
    poison(device)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5, impl=impl)
    assert normed.dtype == total.dtype == residual.dtype
    assert relative_error(total, whole(x) + residual.double()) < 4e-3
    want = kernels.rms_norm(total.double(), weight.double(), 1e-5, impl="torch")
    assert relative_error(normed, want) < 4e-3
    gate_up = partials(rows, 2 * width, splits, 4, device)
    got = kernels.silu_mul(gate_up, impl=impl)
    assert got.shape == (rows, width) and relative_error(got, kernels.silu_mul(whole(gate_up), impl="torch")) < 4e-3


def check_rope_write(
    format: str, rows: int, heads: int, kv_heads: int, head_dim: int, splits: int, norm: bool, device: str, *,
    impl: str, order: str | None = None,
) -> None:
    """Queries against float64; the cache against the reference's, read back; a padding row writes nothing."""
    width = (heads + 2 * kv_heads) * head_dim
    qkv = partials(rows, width, splits, 5, device)
    blocks = rows // BLOCK + 2
    slots = torch.randperm(blocks * BLOCK, generator=torch.Generator().manual_seed(3))[:rows].to(device)
    slots[rows // 2] = -1
    positions = torch.randint(0, 500, (rows,), generator=generator(9, device), device=device)
    angles = torch.outer(
        torch.arange(500, device=device), 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    )
    turn = kernels.rotation(positions, torch.cat((angles.cos(), angles.sin()), -1))
    norms = (normal((head_dim,), 6, device), normal((head_dim,), 7, device), 1e-6) if norm else None
    wide = None if norms is None else (norms[0].double(), norms[1].double(), norms[2])
    table = torch.arange(blocks, device=device)
    bound = {"bf16": 6e-3, "int8": 1.5e-2, "fp8": 6e-2, "k8v4": 0.15, "int4": 0.15}[format]
    for settled in (False, True):
        layers = [kernels.allocate_kv(format, blocks, BLOCK, kv_heads, head_dim, device, order) for _ in range(2)]
        want = kernels.rope_write(whole(qkv), layers[1], slots, turn.double(), wide, impl="torch")
        poison(device)
        got = kernels.rope_write(qkv, layers[0], slots, turn, norms, settled=settled, impl=impl)
        assert got.shape == (rows, heads, head_dim) and relative_error(got, want) < 6e-3
        for side, reference in zip(
            kernels.read_kv(layers[0], table, blocks * BLOCK), kernels.read_kv(layers[1], table, blocks * BLOCK),
            strict=True,
        ):
            assert torch.equal((side == 0).all(-1), (reference == 0).all(-1)), "written elsewhere than the reference"
            assert relative_error(side, reference) < bound


def check_operands(
    format: str, group_size: int, rows: int, splits: int, device: str, *, impl: str, layout: str
) -> None:
    """What `normed` and `add_normed` make for a weight gives the product that plain rows give it."""
    width, n = 512, 96  # SiLU-mul takes two programs for a row
    weight = kernels.pack_weight(
        normal((n, width), 1, device).float() * 0.05 + 0.01, format, group_size=group_size, device=device, layout=layout
    )
    x, residual, norm = (
        partials(rows, width, splits, 2, device), normal((rows, width), 3, device), normal((width,), 4, device),
    )
    gate_up = partials(rows, 2 * width, splits, 5, device)
    poison(device)
    added, total = kernels.add_normed(x, residual, norm, 1e-5, weight, impl=impl)
    plain, plain_total = kernels.add_rms_norm(x, residual, norm, 1e-5, impl=impl)
    assert torch.equal(total, plain_total)
    pairs: tuple[tuple[kernels.Operand, Tensor], ...] = (
        (kernels.normed(residual, norm, 1e-5, weight, impl=impl), kernels.rms_norm(residual, norm, 1e-5, impl=impl)),
        (added, plain),
    )
    if weight.layout == "planes":
        from kernels.rows.elementwise_triton import summed_add_rms_norm, summed_rms_norm, summed_silu_mul

        summed, summed_total = summed_add_rms_norm(x, residual, norm, 1e-5, group_size)
        assert torch.equal(summed_total, plain_total) and torch.equal(summed.x, plain)
        pairs += (
            (summed, plain),
            (summed_rms_norm(residual, norm, 1e-5, group_size), pairs[0][1]),
            (summed_silu_mul(gate_up, group_size), kernels.silu_mul(gate_up, impl=impl)),
        )
    dense = weight.dequantize(torch.float64).t()
    bound = {"w8a8": 2e-2, "fp8": 5e-2}.get(format, 4e-3)  # activations of 8 bits
    for operand, rows16 in pairs:
        got = kernels.linear(operand, weight, impl=impl)
        assert got.shape == (rows, n) and relative_error(got, rows16.double() @ dense) < bound


def check_gated(
    format: str, group_size: int, rows: int, inner: int, k: int, device: str, *, impl: str, layout: str | None = None
) -> None:
    """silu(gate) * up of a fused weight against float64, for a reader of 16 bits and for one of 8."""
    x = normal((rows, k), 1, device)
    fused = normal((2 * inner, k), 2, device).float() * 0.05
    weight = kernels.pack_weight(fused, format, group_size=group_size, device=device, layout=layout)
    gate, up = (x.double() @ weight.dequantize(torch.float64).t()).chunk(2, 1)
    want = gate / (1 + torch.exp(-gate)) * up
    for reader, bound in (("bf16", 6e-3), ("w8a8", 6e-2)):  # 8 bits over rows with few large elements
        reading = kernels.pack_weight(normal((16, inner), 3, device), reader, device=device, layout="plain")
        poison(device)
        got = kernels.gated(x, weight, None, reading, impl=impl)
        got = got if isinstance(got, Tensor) else got.dequantize()
        bound = max(bound, {"w8a8": 3e-2, "fp8": 6e-2}.get(format, 0) if rows > 16 else 0)
        assert got.shape == (rows, inner) and relative_error(got, want) < bound
    bias = normal((2 * inner,), 4, device)
    gate, up = (x.double() @ weight.dequantize(torch.float64).t() + bias.double()).chunk(2, 1)
    bound = {"w8a8": 3e-2, "fp8": 6e-2}.get(format, 1e-2) if rows > 16 else 1e-2
    biased = kernels.gated_linear(x, weight, bias, impl=impl)
    assert relative_error(biased, gate / (1 + torch.exp(-gate)) * up) < bound

"""The problems that `bench` and `tune` run: shapes of a 7B decoder, inputs on the device, and calls that rotate through copies."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_cache import KVLayer, allocate_kv
from .packing import PackedWeight, pack_weight, random_weight
from .timing import copies_for
from .weights import WEIGHT_FORMATS

Calls = list[Callable[[], object]]

# (N, K) of the fused matrices of a 7B decoder with grouped KV heads (Mistral 7B's dimensions)
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


@dataclass(frozen=True)
class Matmul:
    """x [m, k] times several copies of a packed weight [n, k], enough to miss the L2 cache."""

    format: str
    m: int
    n: int
    k: int
    group_size: int
    x: Tensor
    weights: list[PackedWeight]

    @property
    def nbytes(self) -> int:
        """The least a call must move: weights and scales, x, y."""
        return self.weights[0].nbytes + 2 * self.m * (self.n + self.k)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def calls(self, run: Callable[[Tensor, PackedWeight], object]) -> Calls:
        return [lambda w=w: run(self.x, w) for w in self.weights]  # type: ignore[misc]


def matmul(format: str, m: int, n: int, k: int, group_size: int = 128, seed: int = 0) -> Matmul:
    """A random problem; the copies of the weight hold the same numbers in different memory."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    first = pack_weight(random_weight(n, k, 0.02, generator, "cuda"), format, group_size=group_size, device="cuda")
    copies = copies_for(WEIGHT_FORMATS[format].nbytes(n, k, group_size))
    scale = first.scale
    weights = [PackedWeight(first.format, first.layout, first.shape, first.data.clone(), None if scale is None else scale.clone(), first.group_size)
               for _ in range(copies)]
    return Matmul(format, m, n, k, group_size, x, weights)


@dataclass(frozen=True)
class Decode:
    """One query token for each of `batch` sequences of `context` cached tokens."""

    format: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    q: Tensor
    layers: list[KVLayer]
    tables: Tensor
    lengths: Tensor

    @property
    def nbytes(self) -> int:
        return self.batch * self.context * self.layers[0].format.bytes_per_token(self.kv_heads, self.head_dim)

    def calls(self, run: Callable[[Tensor, KVLayer, Tensor, Tensor, float], object]) -> Calls:
        return [lambda layer=layer: run(self.q, layer, self.tables, self.lengths, self.head_dim ** -0.5) for layer in self.layers]  # type: ignore[misc]


def decode(format: str, batch: int, context: int, block_size: int = 64, heads: int = 32, kv_heads: int = 8, head_dim: int = 128, seed: int = 0) -> Decode:
    """A random problem over shuffled blocks; the caches hold random codes with sane scales."""
    generator = torch.Generator("cuda").manual_seed(seed)
    per_row = -(-context // block_size)
    nbytes = batch * context * 4 * kv_heads * head_dim
    layers = []
    for _ in range(copies_for(nbytes)):
        layer = allocate_kv(format, per_row * batch, block_size, kv_heads, head_dim, "cuda")
        for data, scales in ((layer.key, layer.key_scale), (layer.value, layer.value_scale)):
            if scales is None:
                data.normal_(generator=generator)
            else:
                data.random_(-(1 << 15), 1 << 15, generator=generator)
                levels = (1 << layer.format.key.bits) - 1
                word = torch.tensor([6 / levels, -3.0]).bfloat16().view(torch.int16).to(torch.int32) & 0xFFFF
                scales.fill_((int(word[0]) << 16) | int(word[1]) - (1 << 32 if word[0] & 0x8000 else 0))
        layers.append(layer)
    tables = torch.randperm(per_row * batch, device="cuda", generator=generator).int().view(batch, per_row)
    q = torch.randn(batch, heads, head_dim, generator=generator, device="cuda").bfloat16()
    return Decode(format, batch, context, heads, kv_heads, head_dim, q, layers, tables, torch.full((batch,), context, dtype=torch.int32, device="cuda"))

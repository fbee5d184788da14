"""The problems that `bench` and `tune` run: shapes of a 7B decoder, inputs on the device, and calls that rotate through
copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.packing import pack_weight, random_weight
from ..formats.weights import WEIGHT_FORMATS
from ..paged.kv_cache import KV_FORMATS, KVLayer, allocate_kv
from ..rows.activations import Activations
from .timing import copies_for

Calls = list[Callable[[], object]]

# (N, K) of the fused matrices of a 7B decoder with grouped KV heads (Mistral 7B's dimensions)
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


HEAD = (92544, 4096)  # the lm_head of InternLM2.5 7B
SLOPE = ((28672, 8192), (57344, 8192))  # two sizes whose times differ by that of their bytes


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
        return [partial(run, self.x, weight) for weight in self.weights]


def matmul(
    format: str, m: int, n: int, k: int, group_size: int = 128, seed: int = 0, copies: int | None = None
) -> Matmul:
    """A random problem; the copies of the weight hold the same numbers in different memory, by default as many as it
    takes to miss the L2 cache."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    first = pack_weight(random_weight(n, k, 0.02, generator, "cuda"), format, group_size=group_size, device="cuda")
    copies = copies or copies_for(WEIGHT_FORMATS[format].nbytes(n, k, group_size))
    scale = first.scale
    weights = [
        replace(first, data=first.data.clone(), scale=None if scale is None else scale.clone()) for _ in range(copies)
    ]
    return Matmul(format, m, n, k, group_size, x, weights)


def int8_matmul(m: int, n: int, k: int, seed: int = 0) -> tuple[Activations, PackedWeight]:
    """Random codes x [m, k] and w [n, k], all equally likely: the hardest for the power limit."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, w = (
        torch.randint(-127, 128, shape, generator=generator, device="cuda", dtype=torch.int8)
        for shape in ((m, k), (n, k))
    )
    x_scale, w_scale = (torch.rand(size, generator=generator, device="cuda") * 0.01 for size in (m, n))
    return Activations(x, x_scale, torch.bfloat16), PackedWeight("w8a8", "plain", (n, k), w, w_scale)


def random_layer(
    format: str, blocks: int, block_size: int, kv_heads: int, head_dim: int, generator: torch.Generator
) -> KVLayer:
    """A cache full of random codes with sane scales (or of Gaussian bf16)."""
    layer = allocate_kv(format, blocks, block_size, kv_heads, head_dim, "cuda")
    for data, scales, codec in (
        (layer.key, layer.key_scale, layer.format.key),
        (layer.value, layer.value_scale, layer.format.value),
    ):
        if scales is None:
            data.normal_(generator=generator)
            continue
        data.random_(-(1 << 15), 1 << 15, generator=generator)
        low, scale = -3.0, 6 / ((1 << codec.bits) - 1)
        if codec.name == "fp8":
            data &= 0xFEFE - (1 << 16)  # without the last bit no byte is a NaN
            low, scale = 0.0, 2.0**-6
        words = torch.tensor([low, scale]).bfloat16().view(torch.int32)  # low in the lower half, scale in the upper
        scales.fill_(int(words[0]))
    return layer


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
        return [
            partial(run, self.q, layer, self.tables, self.lengths, self.head_dim**-0.5) for layer in self.layers
        ]


def decode(
    format: str, batch: int, context: int, block_size: int = 64, heads: int = 32, kv_heads: int = 8,
    head_dim: int = 128, seed: int = 0,
) -> Decode:
    """A random problem over shuffled blocks; the caches hold random codes with sane scales."""
    generator = torch.Generator("cuda").manual_seed(seed)
    per_row = -(-context // block_size)
    nbytes = batch * context * KV_FORMATS[format].bytes_per_token(kv_heads, head_dim)
    layers = [
        random_layer(format, per_row * batch, block_size, kv_heads, head_dim, generator)
        for _ in range(copies_for(nbytes))
    ]
    tables = torch.randperm(per_row * batch, device="cuda", generator=generator).int().view(batch, per_row)
    q = torch.randn(batch, heads, head_dim, generator=generator, device="cuda").bfloat16()
    return Decode(
        format,
        batch,
        context,
        heads,
        kv_heads,
        head_dim,
        q,
        layers,
        tables,
        torch.full((batch,), context, dtype=torch.int32, device="cuda"),
    )


@dataclass(frozen=True)
class Prefill:
    """A chunk of new tokens behind a cached prefix, for one sequence."""

    q: Tensor
    layers: list[KVLayer]
    table: Tensor
    query_starts: Tensor
    lengths: Tensor
    scale: float
    flops: int

    def calls(self, run: Callable[[Tensor, KVLayer, Tensor, Tensor, Tensor, float], object]) -> Calls:
        return [
            partial(run, self.q, layer, self.table, self.query_starts, self.lengths, self.scale)
            for layer in self.layers
        ]


def prefill(
    format: str, chunk: int, context: int, block_size: int = 64, heads: int = 32, kv_heads: int = 8,
    head_dim: int = 128, seed: int = 0,
) -> Prefill:
    """A chunk of `chunk` tokens that ends a context of `context`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = -(-context // block_size)
    layers = [random_layer(format, blocks, block_size, kv_heads, head_dim, generator) for _ in range(2)]
    table = torch.randperm(blocks, device="cuda", generator=generator).int()[None]
    q = torch.randn(chunk, heads, head_dim, generator=generator, device="cuda").bfloat16()
    seen = chunk * (context - chunk) + chunk * (chunk + 1) // 2
    starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, chunk], [context]))
    return Prefill(q, layers, table, starts, lengths, head_dim**-0.5, 4 * seen * heads * head_dim)

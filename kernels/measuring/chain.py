"""Decoder layers as the engine runs them, but for the engine: what a step of decodes costs per layer, kernels and gaps
together."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.packed import PackedWeight
from ..paged.attention import AttentionPlan, Settled, decode_attention
from ..paged.kv_cache import KVLayer
from ..paged.qkv import rope_write
from ..products.matmul import linear
from ..products.operands import add_normed, gated, normed
from ..rows.elementwise import add_rms_norm, rotation
from . import problems

CONTEXT, BLOCK, KV_HEADS, HEAD_DIM = 640, 64, 8, 128


@dataclass(frozen=True)
class Chain:
    """Decode of `m` sequences through layers with a 7B's dimensions, weights and caches of their own each."""

    layers: list[tuple[dict[str, PackedWeight], KVLayer]]
    residual: Tensor
    norm: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    turn: Tensor

    def run(self) -> Tensor:
        residual = self.residual
        x = normed(residual, self.norm, 1e-5, self.layers[0][0]["qkv"])
        y = residual
        plan = AttentionPlan(Settled(), None)
        for i, (weights, kv) in enumerate(self.layers):
            q = rope_write(linear(x, weights["qkv"], partial=True), kv, self.slots, self.turn, settled=True)
            attended = decode_attention(q, kv, self.tables, self.lengths, HEAD_DIM**-0.5, plan)
            y = linear(attended.flatten(1), weights["o"], partial=True)
            x, residual = add_normed(y, residual, self.norm, 1e-5, weights["gate_up"])
            inner = gated(x, weights["gate_up"], None, weights["down"])
            y = linear(inner, weights["down"], partial=True)
            if i + 1 < len(self.layers):
                x, residual = add_normed(y, residual, self.norm, 1e-5, self.layers[i + 1][0]["qkv"])
        return add_rms_norm(y, residual, self.norm, 1e-5)[0]

    def microseconds(self, replays: int = 5) -> float:
        """Median time of one layer."""
        self.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(2):
                self.run()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(replays):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (2 * len(self.layers)))
        return statistics.median(times)


def chain(format: str, m: int, layers: int = 4, kv: str = "bf16", seed: int = 0) -> Chain:
    """A random chain in one weight format and one KV format."""
    generator = torch.Generator("cuda").manual_seed(seed)
    per_row = CONTEXT // BLOCK
    held = [
        (
            {name: problems.matmul(format, m, n, k, copies=1).weights[0] for name, (n, k) in problems.SHAPES.items()},
            problems.random_layer(kv, per_row * m, BLOCK, KV_HEADS, HEAD_DIM, generator),
        )
        for _ in range(layers)
    ]
    width = problems.SHAPES["qkv"][1]
    tables = torch.randperm(per_row * m, device="cuda", generator=generator).int().view(m, per_row)
    positions = torch.full((m,), CONTEXT - 1, device="cuda")
    angles = torch.rand(CONTEXT, HEAD_DIM, device="cuda", generator=generator)
    return Chain(
        held,
        torch.randn(m, width, device="cuda", generator=generator).bfloat16(),
        torch.rand(width, device="cuda", generator=generator).bfloat16(),
        tables,
        torch.full((m,), CONTEXT, dtype=torch.int32, device="cuda"),
        tables[:, -1].long() * BLOCK + BLOCK - 1,
        rotation(positions, angles),
    )

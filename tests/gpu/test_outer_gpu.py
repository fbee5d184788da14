"""What a step computes outside its layers, on a CUDA device against the reference there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels
from tests.unit.kernels import checks, checks_outer
from tests.unit.kernels.checks import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none here"),
]


@pytest.mark.parametrize("rows, head_dim", [(2, 128), (64, 64), (3000, 128)])
def test_rotation(rows: int, head_dim: int) -> None:
    checks_outer.check_rotation(rows, head_dim, "cuda", impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, vocab", [(1, 128256), (9, 92544), (9, 50257), (16, 1), (70, 32000), (18, 151936)])
def test_highest(rows: int, vocab: int, dtype: torch.dtype) -> None:
    checks_outer.check_highest(rows, vocab, dtype, "cuda", impl="triton")


@pytest.mark.parametrize("sampled, rows", [(1, 2), (64, 64), (256, 8192)])
def test_feed(sampled: int, rows: int) -> None:
    checks_outer.check_feed(sampled, rows, "cuda", impl="triton")


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "w8a8", "fp8"])
@pytest.mark.parametrize("rows, width", [(1, 4096), (16, 896), (300, 4096)])
def test_embed(format: str, rows: int, width: int) -> None:
    checks_outer.check_embed(rows, width, format, "cuda", impl="triton")


def test_captured_and_replayed() -> None:
    """As a graph begins and ends: kernels launched before their predecessors have ended read what those wrote, also
    when the graph is replayed with other inputs."""
    board, given = torch.zeros(8, dtype=torch.int64, device="cuda"), torch.arange(4, device="cuda") + 100
    feed = torch.zeros(4, dtype=torch.int64, device="cuda")
    table, norm = normal((5000, 512), 1, "cuda"), normal((512,), 2, "cuda")
    head = kernels.pack_weight(normal((5000, 512), 3, "cuda"), "bf16", device="cuda")
    largest = torch.zeros(4, dtype=torch.bfloat16, device="cuda")
    cos_sin = torch.randn(5000, 128, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        tokens = kernels.feed_tokens(board, given, feed)
        turn = kernels.rotation(tokens, cos_sin)
        x, _ = kernels.embed_normed(tokens, table, norm, 1e-5, head)
        logits = kernels.linear(x, head)
        kernels.highest(logits, (largest, board[:4]))
        return tokens, turn, logits

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, turn, logits = step()
    for seed in range(20):
        feed.copy_(torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:4])
        want = torch.cat((board, given)).take(feed)
        graph.replay()
        assert torch.equal(tokens, want) and torch.equal(turn, kernels.rotation(want, cos_sin, impl="torch"))
        x = kernels.embed_rms_norm(want, table, norm, 1e-5, impl="torch")[0]
        assert checks.relative_error(logits, kernels.linear(x, head, impl="torch")) < 1e-2
        values, indices = checks_outer.first_of_highest(logits)
        assert torch.equal(largest, values) and torch.equal(board[:4], indices)

"""Checks of what a step computes outside its layers: tokens, their embedding and rotation, and the most likely ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kernels
from tests.unit.kernels.checks import generator, normal, poison


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_rotation(rows: int, head_dim: int, device: str, *, impl: str) -> None:
    """The reference's bits: position 0, whose sines are 0 and -0, the last one, and a table that is a view."""
    wide = torch.randn(300, head_dim + 8, generator=generator(1, device), device=device)
    cos_sin = wide[:, :head_dim]
    cos_sin[0, : head_dim // 2], cos_sin[0, head_dim // 2 :] = 1, 0
    positions = torch.randint(0, 300, (rows,), generator=generator(2, device), device=device)
    positions[0], positions[-1] = 0, 299
    poison(device)
    for table in (cos_sin, cos_sin.contiguous()):
        got = kernels.rotation(positions, table, impl=impl)
        assert same_bits(got, kernels.rotation(positions, table, impl="torch"))
    cos, sin = cos_sin[positions].chunk(2, 1)
    assert torch.equal(got[:, 0], torch.cat((cos, cos), 1)) and torch.equal(got[:, 1], torch.cat((-sin, sin), 1))
    assert kernels.rotation(positions[:0], cos_sin, impl=impl).shape == (0, 2, head_dim)


def first_of_highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `highest` promises, in plain words: NaN if a row has one, else the largest; the first that equals it."""
    values, indices = [], []
    for row in logits.double().tolist():
        nan = [i for i, x in enumerate(row) if math.isnan(x)]
        best = nan[0] if nan else row.index(max(row))
        values.append(row[best])
        indices.append(best)
    return torch.tensor(values).to(logits.device, logits.dtype), torch.tensor(indices, device=logits.device)


def check_highest(rows: int, vocab: int, dtype: torch.dtype, device: str, *, impl: str) -> None:
    """Random rows (in bf16 mostly with equals), and those that no order of bits gets right by itself."""
    g = generator(rows * vocab, device)
    logits = torch.randn(rows, vocab, generator=g, device=device).to(dtype)
    at = torch.randint(0, vocab, (3, rows), generator=g, device=device).tolist()
    for row in range(rows):
        i, j, k = (spots[row] for spots in at)
        if row % 9 == 1:
            logits[row] = -logits[row].abs() - 1  # all negative
        elif row % 9 == 2:
            logits[row] = -math.inf
        elif row % 9 == 3:
            logits[row, i], logits[row, j] = math.inf, math.nan
        elif row % 9 == 4:
            logits[row] = -1
            logits[row, [i, j, k]] = torch.tensor([0.0, -0.0, -0.0], dtype=dtype, device=device)
        elif row % 9 == 5:
            logits[row, i] = -torch.tensor(math.nan, dtype=dtype, device=device)  # its sign is set
        elif row % 9 == 6:
            logits[row] = 3.5  # the first of all
        elif row % 9 == 7:
            logits[row, [i, j, k]] = math.inf
        elif row % 9 == 8:
            logits[row, vocab - 1] = 1e30
    want = first_of_highest(logits)
    wide = torch.full((rows, vocab + 3), math.inf, dtype=dtype, device=device)
    wide[:, :vocab] = logits
    poison(device)
    for given in (logits, wide[:, :vocab]):
        out = torch.full((rows,), -7, dtype=dtype, device=device), torch.full((rows,), -7, device=device)
        for values, indices in (kernels.highest(given, impl=impl), kernels.highest(given, out, impl=impl)):
            assert values.dtype == dtype and indices.dtype == torch.int64
            assert torch.equal(values.isnan(), want[0].isnan())
            assert torch.equal(values.nan_to_num(1e4), want[0].nan_to_num(1e4)) and torch.equal(indices, want[1])
        assert values is out[0] and indices is out[1]


def check_feed(sampled: int, rows: int, device: str, *, impl: str) -> None:
    board = torch.randint(0, 1 << 40, (sampled,), generator=generator(1, device), device=device)
    given = torch.randint(0, 1 << 40, (rows,), generator=generator(2, device), device=device)
    feed = torch.randint(0, sampled + rows, (rows,), generator=generator(3, device), device=device)
    feed[0], feed[-1] = sampled - 1, sampled + rows - 1
    got = kernels.feed_tokens(board, given, feed, impl=impl)
    known = board.tolist() + given.tolist()
    assert got.dtype == torch.int64 and got.tolist() == [known[i] for i in feed.tolist()]


def check_embed(
    rows: int, width: int, format: str, device: str, *, impl: str, layout: str | None = None
) -> None:
    """The rows as they are, and what `normed` makes of them for a product in that format, bit by bit."""
    table, norm = normal((500, width), 1, device), normal((width,), 2, device)
    reader = kernels.pack_weight(normal((32, width), 3, device), format, device=device, layout=layout)
    tokens = torch.randint(0, 500, (rows,), generator=generator(4, device), device=device)
    tokens[0] = 499
    poison(device)
    operand, found = kernels.embed_normed(tokens, table, norm, 1e-5, reader, impl=impl)
    assert torch.equal(found, table[tokens])
    want = kernels.normed(found, norm, 1e-5, reader, impl=impl)
    assert type(operand) is type(want)
    if isinstance(operand, Tensor):
        assert isinstance(want, Tensor) and torch.equal(operand, want)
    else:
        assert torch.equal(operand.dequantize(), want.dequantize())

"""Paged decode attention on the CPU from ATen's operators: gathered blocks (see `gather_cpu`), then batched products.

Quantized codes enter the product as centred bf16 integers and the scales are applied to the scores and the weights (as
in `decode_triton`). What lies behind a sequence's last token cannot reach a result: scores there are replaced or
masked, and what would survive that is cleared.

ATen's bf16 products are rounded to bf16. Keys often have channels far from zero (biases, outliers), which give all
scores of a query a large part in common: it would take the few bits there are, and softmax takes it out again. So the
product subtracts it before it rounds (`_common`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather_cpu import Tails, find_tails, gather, gathered_blocks
from .kv_cache import Codec, KVLayer, scale_and_low

# Rows are taken in order of length, in chunks of this many key elements, so that short rows are not padded to long ones
# and what is gathered stays in the cache; fewer, larger chunks cost fewer operators.
CHUNK_ELEMENTS = 1 << 21
SAMPLES = 4  # keys of a row whose mean stands for what all have in common


@dataclass(frozen=True)
class Rows:
    """Decoding sequences that are computed together, padded to the longest, and the indices that this takes.

    at: which rows of the batch, None for all. counts: their lengths. table: the blocks to gather (`gathered_blocks`).
    behind: bool [rows, tokens], what lies past each row's end, None where all are equally long; tails: the same by
    blocks. samples: int64 [Hkv * rows * SAMPLES], some tokens of each row, counted through heads and rows. space: what
    was gathered for the layer before, to be written over, and the mask that layers share: memory that malloc hands out
    anew each time costs a page fault every 4 kB, more than the copy itself.
    """

    at: Tensor | None
    counts: list[int]
    table: Tensor
    behind: Tensor | None
    tails: Tails | None
    samples: Tensor
    space: dict[str, Tensor] = field(default_factory=dict)


DecodePlan = tuple[Rows, ...]
"""A batch of decodes in groups of similar length; rows of length 0 are in none of them."""


def plan_decode(layer: KVLayer, block_tables: Tensor, lengths: Tensor) -> DecodePlan:
    """What `decode_cpu` derives from lengths and block tables alone: the same for every layer of a step."""
    counts = lengths.tolist()
    per_token = layer.kv_heads * layer.head_dim
    if counts and min(counts) > 0 and (len(counts) == 1 or len(counts) * max(counts) * per_token <= CHUNK_ELEMENTS):
        return (_rows(None, block_tables, lengths, counts, layer),)
    groups, rows = [], []
    order = sorted((b for b, n in enumerate(counts) if n), key=counts.__getitem__)
    for b, following in zip(order, [*order[1:], -1], strict=False):
        rows.append(b)
        if following < 0 or (len(rows) + 1) * counts[following] * per_token > CHUNK_ELEMENTS:
            at = torch.tensor(rows)
            groups.append(_rows(at, block_tables[at], lengths[at], [counts[b] for b in rows], layer))
            rows = []
    return tuple(groups)


def _rows(at: Tensor | None, block_tables: Tensor, lengths: Tensor, counts: list[int], layer: KVLayer) -> Rows:
    table, held, blocks = gathered_blocks(block_tables, lengths, counts, layer)
    width = blocks * layer.block_size if len(counts) > 1 else counts[0]  # one row is cut to its length
    spread = (lengths[:, None].long() * torch.arange(1, SAMPLES + 1) - 1) // SAMPLES
    first = torch.arange(layer.kv_heads * len(counts)).view(-1, len(counts), 1) * width
    samples = (first + spread).view(-1)
    if min(counts) == width:
        return Rows(at, counts, table, None, None, samples)
    behind = torch.arange(width) >= lengths[:, None]
    return Rows(at, counts, table, behind, find_tails(held, lengths, layer.block_size, blocks), samples)


def decode_cpu(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float,
    plan: DecodePlan | None = None, out: Tensor | None = None,
) -> Tensor:
    """See `attention.decode_attention`."""
    plan = plan_decode(layer, block_tables, lengths) if plan is None else plan
    if len(plan) == 1 and plan[0].at is None:
        whole = _decode_rows(q, layer, plan[0], scale)
        return whole if out is None else out.copy_(whole)
    out = torch.zeros_like(q) if out is None else out.zero_()
    for rows in plan:
        out[rows.at] = _decode_rows(q[rows.at], layer, rows, scale)
    return out


def _decode_rows(q: Tensor, layer: KVLayer, rows: Rows, scale: float) -> Tensor:
    if layer.format.name != "bf16":
        return _decode_codes(q, layer, rows, scale)
    return (_decode_alone if len(rows.counts) == 1 else _decode_masked)(q, layer, rows, scale)


def _decode_alone(q: Tensor, layer: KVLayer, row: Rows, scale: float) -> Tensor:
    """One sequence in bf16: its keys and values are one matrix per head, which fused attention takes as they are."""
    k, v = (
        gather(words, row.table, 1, row.space, side).transpose(0, 1)[:, :, : row.counts[0]]
        for words, side in ((layer.key, "key"), (layer.value, "value"))
    )
    rows = q.to(torch.bfloat16).reshape(1, layer.kv_heads, -1, layer.head_dim)
    return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape).to(q.dtype)


def _decode_masked(q: Tensor, layer: KVLayer, group: Rows, scale: float) -> Tensor:
    """Several sequences in bf16, padded to the longest: scale and mask enter the product, and the weights come out of
    softmax in the 16 bits that the second product takes."""
    batch, heads, d = q.shape
    hkv = layer.kv_heads
    k, v = (
        gather(words, group.table, batch, group.space, side)
        for words, side in ((layer.key, "key"), (layer.value, "value"))
    )
    if group.tails is not None:  # NaN would survive a mask that is added and a weight of zero
        group.tails.clear(k)
        group.tails.clear(v)
    rows = q.view(batch, hkv, -1, d).transpose(0, 1).to(torch.bfloat16).reshape(hkv * batch, -1, d)
    common = _common(rows, k, group)
    if group.behind is None:
        mask = common.mul_(-scale).expand(-1, -1, k.shape[2])
    else:
        mask = torch.sub(_mask(group, hkv, rows.shape[1], k.shape[2]), common, alpha=scale)
    p = torch.softmax(torch.baddbmm(mask, rows, k.flatten(0, 1).transpose(1, 2), alpha=scale), -1)
    y = torch.bmm(p, v.flatten(0, 1)).view(hkv, batch, -1, d)
    return y.transpose(0, 1).reshape(batch, heads, d).to(q.dtype)


def _common(rows: Tensor, k: Tensor, group: Rows) -> Tensor:
    """bf16 [Hkv * B, query heads of one KV head, 1]: about what rows [Hkv * B, query heads, D] give with the mean of
    some keys of k [Hkv, B, tokens, D]. All scores of a query may lose the same number, whichever; this one is near
    them. Sums of two and of products by hand take half the time of `mean` and `bmm` at this size."""
    some = k.view(-1, k.shape[-1]).index_select(0, group.samples).view(len(rows), 2, SAMPLES // 2, -1)
    some = some[:, 0] + some[:, 1]
    mean = (some[:, 0] + some[:, 1]).mul_(1 / SAMPLES)
    return (rows * mean[:, None]).sum(-1, keepdim=True)


def _mask(group: Rows, hkv: int, per_head: int, width: int) -> Tensor:
    """bf16 [Hkv * B, query heads of one KV head, tokens], -inf behind a row's end; made once for all layers."""
    held = group.space.get("mask")
    if held is None or held.shape != (hkv * len(group.counts), per_head, width):
        held = torch.zeros(hkv, len(group.counts), per_head, width, dtype=torch.bfloat16)
        assert group.behind is not None
        held.masked_fill_(group.behind[:, None], float("-inf"))
        group.space["mask"] = held = held.flatten(0, 1)
    return held


def _decode_codes(q: Tensor, layer: KVLayer, group: Rows, scale: float) -> Tensor:
    """Sequences of quantized keys and values, padded to the longest; every length is at least 1."""
    batch, heads, d = q.shape
    hkv = layer.kv_heads
    key, value, codec_k, codec_v = layer.key, layer.value, layer.format.key, layer.format.value
    k, ks, kl = _operand(key, layer.key_scale, codec_k, group, "key")
    v, vs, vl = _operand(value, layer.value_scale, codec_v, group, "value")
    if group.tails is not None and group.behind is not None:
        group.tails.clear(v)
        # a NaN scale behind the end would survive multiplication by zero
        vs, vl = vs.masked_fill(group.behind, 0), vl.masked_fill(group.behind, 0)
    rows = q.view(batch, hkv, -1, d).transpose(0, 1).to(torch.bfloat16)  # [Hkv, B, group, D]
    q_codes = rows[..., _permutation(d, codec_k.bits)].reshape(hkv * batch, -1, d)
    common = _common(q_codes, k, group)
    s = torch.baddbmm(common.expand(-1, -1, k.shape[2]), q_codes, k.flatten(0, 1).transpose(1, 2), beta=-1)
    s = s.float().add_(common).view(hkv, batch, -1, k.shape[2])
    s = s.mul_((ks * scale)[:, :, None]).add_(rows.float().sum(-1, keepdim=True) * (kl * scale)[:, :, None])
    if group.behind is not None:
        s.masked_fill_(group.behind[:, None], float("-inf"))
    p = torch.softmax(s, -1)
    y = torch.bmm((p * vs[:, :, None]).bfloat16().flatten(0, 1), v.flatten(0, 1)).view(hkv, batch, -1, d)
    y = (y.float() + p @ vl[..., None])[..., _inverse(d, codec_v.bits)]
    return y.transpose(0, 1).reshape(batch, heads, d).to(q.dtype)


def _operand(
    words: Tensor, scales: Tensor | None, codec: Codec, group: Rows, side: str
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 [Hkv, B, tokens, D] with scale and low [Hkv, B, tokens]: x ~ operand * scale + low, its elements in
    `_permutation`'s order; one row is cut to its own length."""
    batch = len(group.counts)
    x = gather(words, group.table, batch, group.space, side)
    if batch == 1:
        x = x[:, :, : group.counts[0]]
    assert scales is not None
    scale, low = scale_and_low(gather(scales, group.table, batch)[:, :, : x.shape[2]])
    if codec.name == "fp8":
        numbers = _e4m3_pairs().index_select(0, x.flatten().int().add_(1 << 15))
        return numbers.view(torch.bfloat16).view(*x.shape[:-1], -1), scale, low
    middle = 1 << (codec.bits - 1)
    codes = x.contiguous().view(torch.uint8)
    if codec.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    return codes.to(torch.bfloat16).sub_(middle), scale, low + middle * scale


@lru_cache(maxsize=1)
def _e4m3_pairs() -> Tensor:
    """The two e4m3 numbers of each word from -2^15 on, as two bf16 in an int32 [2^16]: looking them up is seven times
    as fast as ATen's conversion."""
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return words.view(torch.float8_e4m3fn).to(torch.bfloat16).view(torch.int32)


@lru_cache(maxsize=16)
def _permutation(d: int, bits: int) -> Tensor:
    """Which element each code of `_operand` is: bytes of a word in memory order, low nibbles before high ones."""
    planes = torch.arange(d).view(16 // bits, -1)
    return (
        planes.t().reshape(-1) if bits == 8 else torch.cat((planes[0::2].t().reshape(-1), planes[1::2].t().reshape(-1)))
    )


@lru_cache(maxsize=16)
def _inverse(d: int, bits: int) -> Tensor:
    return torch.argsort(_permutation(d, bits))

"""Paged attention on the CPU from ATen's operators: gather a batch's blocks, then batched matrix products.

In the CPU's memory order (heads outermost, see `kv_cache`) gathering a batch's blocks is one index_select, and what it
gives is already the batch of matrices [heads * batch, tokens, D] that bmm wants: no transpose, no loop over sequences.
Quantized codes enter the product as centred bf16 integers and the scales are applied to the scores and the weights (as
in `decode_triton`). What lies behind a sequence's last token cannot reach a result: scores there are replaced or
masked, and what would survive that is cleared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import Codec, KVLayer, decode, scale_and_low

# Rows are taken in order of length, in chunks of this many key elements, so that short rows are not padded to long ones
# and what is gathered stays in the cache; fewer, larger chunks cost fewer operators.
CHUNK_ELEMENTS = 1 << 21
CAUSAL_ROWS = 256  # a whole prompt of at least this many tokens runs alone, so that the masked half is skipped


@dataclass(frozen=True)
class Rows:
    """Decoding sequences that are computed together, padded to the longest, and the indices that this takes.

    at: which rows of the batch, None for all. counts: their lengths. table: the blocks to gather, see `_blocks`.
    behind: bool [rows, tokens], what lies past each row's end, None where all are equally long; tails: the same by
    blocks. space: what was gathered for the layer before, to be written over: memory that malloc hands out anew each
    time costs a page fault every 4 kB, more than the copy itself.
    """

    at: Tensor | None
    counts: list[int]
    table: Tensor
    behind: Tensor | None
    tails: _Tails | None
    space: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tails:
    """Which tokens of gathered blocks, int64 [n] counted through all rows, are not a row's own: the rest of its last
    block, and the repetitions of its first block where that one is not full. Repetitions of a full block stay: they are
    a row's own numbers, which a weight of zero takes out."""

    tokens: Tensor

    def clear(self, x: Tensor) -> None:
        """Zero them in x [Hkv, B, tokens, D], in place: somebody else's NaN would survive a weight of zero."""
        x.view(x.shape[0], -1, x.shape[-1]).index_fill_(1, self.tokens, 0)


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
    table, held, blocks = _blocks(block_tables, lengths, counts, layer)
    width = blocks * layer.block_size
    if len(counts) == 1 or min(counts) == width:  # (one row is cut to its length)
        return Rows(at, counts, table, None, None)
    behind = torch.arange(width) >= lengths[:, None]
    return Rows(at, counts, table, behind, _tails(held, lengths, layer.block_size, blocks))


def decode_cpu(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float, plan: DecodePlan | None = None
) -> Tensor:
    """See `attention.decode_attention`."""
    plan = plan_decode(layer, block_tables, lengths) if plan is None else plan
    if len(plan) == 1 and plan[0].at is None:
        return _decode_rows(q, layer, plan[0], scale)
    out = torch.zeros_like(q)
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
        _gather(words, row.table, 1, row.space, side).transpose(0, 1)[:, :, : row.counts[0]]
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
        _gather(words, group.table, batch, group.space, side)
        for words, side in ((layer.key, "key"), (layer.value, "value"))
    )
    if group.tails is not None:  # NaN would survive a mask that is added and a weight of zero
        group.tails.clear(k)
        group.tails.clear(v)
    rows = q.view(batch, hkv, -1, d).transpose(0, 1).to(torch.bfloat16).reshape(hkv * batch, -1, d)
    mask = _mask(group, hkv, rows.shape[1], k.shape[2])
    p = torch.softmax(torch.baddbmm(mask, rows, k.flatten(0, 1).transpose(1, 2), alpha=scale), -1)
    y = torch.bmm(p, v.flatten(0, 1)).view(hkv, batch, -1, d)
    return y.transpose(0, 1).reshape(batch, heads, d).to(q.dtype)


def _mask(group: Rows, hkv: int, per_head: int, width: int) -> Tensor:
    """bf16 [Hkv * B, query heads of one KV head, tokens], -inf behind a row's end; made once for all layers."""
    held = group.space.get("mask")
    if held is None or held.shape != (hkv * len(group.counts), per_head, width):
        held = torch.zeros(hkv, len(group.counts), per_head, width, dtype=torch.bfloat16)
        if group.behind is not None:
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
    s = torch.bmm(q_codes, k.flatten(0, 1).transpose(1, 2)).view(hkv, batch, -1, k.shape[2]).float()
    s = s.mul_((ks * scale)[:, :, None]).add_(rows.float().sum(-1, keepdim=True) * (kl * scale)[:, :, None])
    if group.behind is not None:
        s.masked_fill_(group.behind[:, None], float("-inf"))
    p = torch.softmax(s, -1)
    y = torch.bmm((p * vs[:, :, None]).bfloat16().flatten(0, 1), v.flatten(0, 1)).view(hkv, batch, -1, d)
    y = (y.float() + p @ vl[..., None])[..., _inverse(d, codec_v.bits)]
    return y.transpose(0, 1).reshape(batch, heads, d).to(q.dtype)


def _blocks(
    block_tables: Tensor, lengths: Tensor, counts: list[int], layer: KVLayer
) -> tuple[Tensor, Tensor, int]:
    """The blocks to gather, how many each row holds [B], and n, the longest's count, to which the others are padded.

    The blocks are int64 [Hkv * B * n], head after head, numbered through all heads' blocks in the CPU's memory order;
    a shorter row repeats its first.
    """
    n = -(-max(counts) // layer.block_size)
    held = (lengths + (layer.block_size - 1)) // layer.block_size
    table = block_tables[:, :n]
    if min(counts) <= (n - 1) * layer.block_size:
        table = torch.where(torch.arange(n) < held[:, None], table, block_tables[:, :1])
    heads = torch.arange(0, layer.kv_heads * layer.num_blocks, layer.num_blocks)
    return (table.reshape(-1) + heads[:, None]).view(-1), held, n


def _gather(
    words: Tensor, table: Tensor, batch: int, space: dict[str, Tensor] | None = None, side: str = ""
) -> Tensor:
    """words [blocks, block_size, Hkv, ...] of the blocks in `table` -> [Hkv, B, tokens, ...], contiguous in the CPU's
    memory order; in `space` under the name `side` if given."""
    by_head = words.movedim(2, 0)
    rows = by_head.flatten(0, 1).flatten(1)
    held = None if space is None else space.get(side)
    if held is not None and held.shape[1] == rows.shape[1]:  # the same format as the layer before
        torch.index_select(rows, 0, table, out=held)
    else:
        held = rows.index_select(0, table)
        if space is not None:
            space[side] = held
    return held.view(by_head.shape[0], batch, -1, *by_head.shape[3:])


def _operand(
    words: Tensor, scales: Tensor | None, codec: Codec, group: Rows, side: str
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 [Hkv, B, tokens, D] with scale and low [Hkv, B, tokens]: x ~ operand * scale + low, its elements in
    `_permutation`'s order; one row is cut to its own length."""
    batch = len(group.counts)
    x = _gather(words, group.table, batch, group.space, side)
    if batch == 1:
        x = x[:, :, : group.counts[0]]
    assert scales is not None
    scale, low = scale_and_low(_gather(scales, group.table, batch)[:, :, : x.shape[2]])
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


def _tails(held: Tensor, lengths: Tensor, block_size: int, width: int) -> _Tails:
    """Of rows that hold `held` blocks each, gathered `width` at a time."""
    token = torch.arange(width * block_size)
    own = torch.where(lengths < block_size, width, held) * block_size  # what is gathered beyond may stay
    return _Tails(((token >= lengths[:, None]) & (token < own[:, None])).view(-1).nonzero().view(-1))


@dataclass(frozen=True)
class Chunks:
    """Prompt chunks that are computed together, padded to the longest, and the indices that this takes.

    rows: where a single chunk stands in the batch, else None; at: int64 [chunks, T], its rows, of which a shorter chunk
    repeats its last; live: bool [chunks, T], False for these repeats. table, tails: as in `Rows`, over all tokens of
    each sequence; longest: the most. seen: bool [chunks, 1, group * T, longest], what each query may attend to, None
    for one whole prompt.
    """

    rows: slice | None
    at: Tensor
    live: Tensor
    table: Tensor
    tails: _Tails
    longest: int
    seen: Tensor | None


PrefillPlan = tuple[Chunks, ...]


def plan_prefill(
    layer: KVLayer, heads: int, block_tables: Tensor, query_starts: Tensor, lengths: Tensor
) -> PrefillPlan:
    """What `prefill_cpu` derives from everything but queries and cache: the same for every layer of a step. Whole long
    prompts are computed alone, everything else in padded groups of similar size."""
    starts, counts = query_starts.tolist(), lengths.tolist()
    chunks = [starts[b + 1] - starts[b] for b in range(len(counts))]
    alone = [b for b, t in enumerate(chunks) if t >= CAUSAL_ROWS and t == counts[b]]
    rest = [b for b, t in enumerate(chunks) if t and b not in alone]
    groups = [[b] for b in alone] + _groups(rest, chunks, counts)
    return tuple(_chunks(g, layer, heads // layer.kv_heads, block_tables, starts, chunks, counts) for g in groups)


def _chunks(
    group: list[int], layer: KVLayer, per_head: int, block_tables: Tensor, starts: list[int], chunks: list[int],
    counts: list[int],
) -> Chunks:
    t, longest = max(chunks[b] for b in group), max(counts[b] for b in group)
    lengths, news = torch.tensor([counts[b] for b in group]), torch.tensor([chunks[b] for b in group])[:, None]
    table, held, blocks = _blocks(block_tables[group], lengths, lengths.tolist(), layer)
    tails = _tails(held, lengths, layer.block_size, blocks)
    step = torch.arange(t).minimum(news - 1)  # padding repeats the last row
    at = torch.tensor([starts[b] for b in group])[:, None] + step
    rows = slice(starts[group[0]], starts[group[0]] + t) if len(group) == 1 else None
    seen = None
    if rows is None or t < longest:
        position = lengths[:, None] - news + step
        seen = (torch.arange(longest) <= position[:, :, None])[:, None, None]
        seen = seen.expand(-1, 1, per_head, -1, -1).flatten(2, 3)
    return Chunks(rows, at, torch.arange(t) < news, table, tails, longest, seen)


def prefill_cpu(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    plan: PrefillPlan | None = None,
) -> Tensor:
    """See `attention.prefill_attention`."""
    plan = plan_prefill(layer, q.shape[1], block_tables, query_starts, lengths) if plan is None else plan
    out = torch.zeros_like(q)
    for chunks in plan:
        _prefill_chunks(out, q, layer, chunks, scale)
    return out


def _groups(rows: list[int], chunks: list[int], counts: list[int]) -> list[list[int]]:
    """Rows of similar size together: padding may cost a third of the scores of a group, or what a call costs anyway."""
    groups: list[list[int]] = []
    longest = used = 0
    for b in sorted(rows, key=lambda b: (chunks[b], counts[b])):
        t, n = chunks[b], max(longest, counts[b])
        padded = t * n * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > 1.5 * (used + t * counts[b]) + 20_000:
            groups.append([])
            n, used = counts[b], 0
        groups[-1].append(b)
        longest, used = n, used + t * counts[b]
    return groups


def _prefill_chunks(out: Tensor, q: Tensor, layer: KVLayer, chunks: Chunks, scale: float) -> None:
    d, hkv = layer.head_dim, layer.kv_heads
    batch, t = chunks.at.shape

    def side(words: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
        x = _gather(words, chunks.table, batch)
        if scales is not None:
            x = decode(x, _gather(scales, chunks.table, batch), codec).bfloat16()
        chunks.tails.clear(x)
        return x[:, :, : chunks.longest].transpose(0, 1)

    k, v = side(layer.key, layer.key_scale, layer.format.key), side(layer.value, layer.value_scale, layer.format.value)
    x = (q[chunks.at] if chunks.rows is None else q[None, chunks.rows]).to(torch.bfloat16)
    if chunks.seen is None:
        y = F.scaled_dot_product_attention(x.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True)
        y = y.transpose(1, 2)
    else:
        packed = x.view(batch, t, hkv, -1, d).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, group * T, D]
        y = F.scaled_dot_product_attention(packed, k, v, chunks.seen, scale=scale)
        y = y.view(batch, hkv, -1, t, d).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if chunks.rows is not None:
        out[chunks.rows] = y[0]
    else:
        out[chunks.at[chunks.live]] = y[chunks.live].to(out.dtype)

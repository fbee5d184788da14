"""Attention over the paged KV cache: the operations, the readable reference, and the choice of implementation.

Decode has one query per sequence, prefill a chunk of queries per sequence behind tokens that are already cached. Both
follow Kwon et al., "PagedAttention" (2023); grouped query heads as in Ainslie et al. (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import Implementations, choose
from .decode_cpu import DecodePlan, decode_cpu, plan_decode
from .kv_access import read_kv
from .kv_cache import KVLayer
from .prefill_cpu import PrefillPlan, chunk_sizes, plan_prefill, prefill_cpu


@dataclass(frozen=True)
class Settled:
    """What there is to plan on a GPU: that tables and lengths are older than the kernel that runs right before decode
    attention, which then reads them while that one ends. Two reads behind one another, of memory that the weights of
    the layers have driven out of the caches, stand before the first of the keys."""


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one step's attention share: indices and masks on a CPU (see `decode_cpu`), see `Settled` on a
    GPU."""

    decode: DecodePlan | Settled | None
    prefill: PrefillPlan | None


def decode_attention(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float,
    plan: AttentionPlan | None = None, *, out: Tensor | None = None, impl: str = "auto",
) -> Tensor:
    """q [B, H, D] against the first lengths[b] cached tokens of each sequence -> [B, H, D] in q's dtype.

    block_tables [B, max_blocks] int32 (entries past a sequence's last block are never followed), lengths [B] int32; a
    row of length 0 gives zeros. scale multiplies q.k, normally D ** -0.5. plan: what `plan_attention` prepared for
    exactly these tables and lengths, and not right before: on a GPU another kernel was started in between. out:
    contiguous, of q's shape and dtype, what is written and returned instead of a new tensor.
    """
    _check("decode_attention", q, layer, block_tables, lengths, out)
    if q.shape[0] != lengths.shape[0]:
        raise ValueError(f"decode_attention: {q.shape[0]} queries for {lengths.shape[0]} sequences")
    attended: Tensor = choose("decode_attention", DECODE_ATTENTION, impl, q.device)(
        q, layer, block_tables, lengths, scale, plan and plan.decode, out
    )
    return attended


def prefill_attention(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    plan: AttentionPlan | None = None, *, out: Tensor | None = None, impl: str = "auto",
) -> Tensor:
    """Causal attention of ragged chunks q [T, H, D] -> [T, H, D] in q's dtype.

    Sequence b owns rows query_starts[b] : query_starts[b+1] (query_starts [B+1] int32), which are its last tokens;
    lengths [B] int32 counts all its tokens, the chunk included, and all their keys and values are already written. Rows
    past query_starts[B] are padding and give zeros. plan, out: as in `decode_attention`.
    """
    _check("prefill_attention", q, layer, block_tables, lengths, out)
    if query_starts.shape[0] != lengths.shape[0] + 1:
        raise ValueError(
            f"prefill_attention: {query_starts.shape[0]} query_starts for {lengths.shape[0]} sequences, "
            "one more is needed"
        )
    attended: Tensor = choose("prefill_attention", PREFILL_ATTENTION, impl, q.device)(
        q, layer, block_tables, query_starts, lengths, scale, plan and plan.prefill, out
    )
    return attended


def plan_attention(
    layer: KVLayer, heads: int, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, num_decodes: int, *,
    impl: str = "auto",
) -> AttentionPlan | None:
    """Once per step what each layer would derive again from tables and lengths; None where an implementation derives
    nothing.

    The first `num_decodes` sequences have one query each, the others a chunk as `query_starts` says. Any layer with the
    same block size and heads will do, whatever its format.
    """
    out: AttentionPlan | None = choose("plan_attention", PLAN_ATTENTION, impl, layer.device)(
        layer, heads, block_tables, query_starts, lengths, num_decodes
    )
    return out


def _check(op: str, q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, out: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[2] != layer.head_dim or q.shape[1] % layer.kv_heads:
        raise ValueError(
            f"{op}: q {tuple(q.shape)} must be [rows, a multiple of {layer.kv_heads} heads, {layer.head_dim}]"
        )
    if block_tables.dim() != 2 or lengths.shape != block_tables.shape[:1]:
        raise ValueError(
            f"{op}: block tables {tuple(block_tables.shape)} and lengths {tuple(lengths.shape)} must be [B, blocks] "
            "and [B]"
        )
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous()):
        raise ValueError(
            f"{op}: out must be contiguous {q.dtype} {tuple(q.shape)}, not {out.dtype} {tuple(out.shape)} of strides "
            f"{out.stride()}"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Reference causal attention of q [T, H, D], the last T of L tokens, over k, v [L, Hkv, D]; float32, or float64
    with q."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    t, heads, _ = q.shape
    group = heads // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.to(wide).transpose(0, 1) @ k.transpose(1, 2) * scale
    later = torch.ones(t, k.shape[1], dtype=torch.bool, device=q.device).triu(k.shape[1] - t + 1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(0, 1).to(q.dtype)


def _decode_torch(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float, plan: None, out: Tensor | None
) -> Tensor:
    out = torch.zeros_like(q) if out is None else out.zero_()
    for b, length in enumerate(lengths.tolist()):
        if length:
            out[b] = attend(q[b : b + 1], *read_kv(layer, block_tables[b], length), scale)[0]
    return out


def _prefill_torch(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    plan: None, out: Tensor | None,
) -> Tensor:
    out = torch.zeros_like(q) if out is None else out.zero_()
    starts, counts = query_starts.tolist(), lengths.tolist()
    for b, (length, chunk) in enumerate(zip(counts, chunk_sizes(starts, counts), strict=True)):
        rows = slice(starts[b], starts[b + 1])
        if chunk:
            out[rows] = attend(q[rows], *read_kv(layer, block_tables[b], length), scale)
    return out


def _decode_triton(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float, plan: Settled | None,
    out: Tensor | None,
) -> Tensor:
    from .decode_triton import decode_triton

    return decode_triton(q, layer, block_tables, lengths, scale, settled=plan is not None, out=out)


def _prefill_triton(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    plan: None, out: Tensor | None,
) -> Tensor:
    from .prefill_triton import prefill_triton

    return prefill_triton(q, layer, block_tables, query_starts, lengths, scale, out=out)


DECODE_ATTENTION: Implementations = {"torch": _decode_torch, "aten": decode_cpu, "triton": _decode_triton}
PREFILL_ATTENTION: Implementations = {"torch": _prefill_torch, "aten": prefill_cpu, "triton": _prefill_triton}


def _plan_nothing(*_: object) -> None:
    """The reference reads tables and lengths itself."""


def _plan_triton(*_: object) -> AttentionPlan:
    return AttentionPlan(Settled(), None)


def _plan_cpu(
    layer: KVLayer, heads: int, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, n: int
) -> AttentionPlan:
    return AttentionPlan(
        plan_decode(layer, block_tables[:n], lengths[:n]) if n else None,
        plan_prefill(layer, heads, block_tables[n:], query_starts, lengths[n:]) if n < len(lengths) else None,
    )


PLAN_ATTENTION: Implementations = {"torch": _plan_nothing, "aten": _plan_cpu, "triton": _plan_triton}

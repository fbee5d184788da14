"""Decode attention over equal and ragged contexts and prefill attention, in each KV format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from ..measuring import problems
from ..measuring.timing import microseconds
from ..paged.attention import attend
from ..paged.decode_triton import decode_triton
from ..paged.kv_access import read_kv
from ..paged.kv_cache import KV_FORMATS
from ..paged.prefill_triton import prefill_triton
from .row import Row, checked, relative_error


def decode_rows() -> Iterator[Row]:
    """32 query heads, 8 KV heads, head_dim 128, blocks of 64 tokens; beside ours scaled_dot_product_attention on
    contiguous bf16."""
    for batch, context in ((1, 8192), (16, 2048), (64, 2048)):
        for format in KV_FORMATS:
            problem = problems.decode(format, batch, context)
            got = decode_triton(problem.q, problem.layers[0], problem.tables, problem.lengths, problem.head_dim**-0.5)
            want = torch.stack(
                [
                    attend(
                        problem.q[b : b + 1].double(), *read_kv(problem.layers[0], problem.tables[b], context),
                        problem.head_dim**-0.5,
                    )[0]
                    for b in range(min(batch, 4))
                ]
            )
            error = checked(relative_error(got[: len(want)], want), 8e-3, f"decode {format} {batch} x {context}")
            us = microseconds(problem.calls(decode_triton))
            others = {}
            if format == "bf16":
                k, v = (torch.randn(batch, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
                others["SDPA"] = microseconds(
                    [partial(F.scaled_dot_product_attention, problem.q[:, :, None], k, v, enable_gqa=True)]
                )
            yield Row(
                "decode attention", f"{batch} x {context} {format}", us, error, None, problem.nbytes / us / 1e6,
                None, others,
            )


def ragged_rows() -> Iterator[Row]:
    """256 sequences of 100 to 1,200 tokens, the longest first as the engine orders them; beside it the same lengths as
    they come."""
    batch, least, most = 256, 100, 1200
    for format in KV_FORMATS:
        problem = problems.decode(format, batch, most)
        lengths = torch.randint(least, most + 1, (batch,), generator=torch.Generator().manual_seed(0)).int()
        as_they_come = replace(problem, lengths=lengths.to(problem.lengths.device))
        ordered = replace(problem, lengths=as_they_come.lengths.sort(descending=True).values)
        scale, layer = problem.head_dim**-0.5, problem.layers[0]
        got = decode_triton(problem.q, layer, problem.tables, ordered.lengths, scale)
        rows = (0, batch // 2, batch - 1)
        want = [
            attend(problem.q[b : b + 1].double(), *read_kv(layer, problem.tables[b], int(ordered.lengths[b])), scale)[0]
            for b in rows
        ]
        error = checked(relative_error(got[list(rows)], torch.stack(want)), 8e-3, f"ragged decode {format}")
        us, unordered = (microseconds(one.calls(decode_triton)) for one in (ordered, as_they_come))
        nbytes = int(lengths.sum()) * layer.format.bytes_per_token(problem.kv_heads, problem.head_dim)
        others = {"in no order": unordered}
        what = f"{batch} x {least} to {most} {format}"
        yield Row("decode attention", what, us, error, None, nbytes / us / 1e6, None, others)


def prefill_rows() -> Iterator[Row]:
    """512 new tokens behind 4096 cached ones; beside ours PyTorch's flash attention on contiguous bf16, causal at the
    lower right."""
    from torch.nn.attention.bias import causal_lower_right

    for format in KV_FORMATS:
        problem = problems.prefill(format, 512, 4608)
        call = (problem.q, problem.layers[0], problem.table, problem.query_starts, problem.lengths, problem.scale)
        k, v = read_kv(problem.layers[0], problem.table[0], 4608)
        error = checked(
            relative_error(prefill_triton(*call), attend(problem.q.float(), k, v, problem.scale)),
            8e-3,
            f"prefill {format}",
        )
        us = microseconds(problem.calls(prefill_triton))
        q, k, v = (x.bfloat16().transpose(0, 1)[None].contiguous() for x in (problem.q, k, v))
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        flash = partial(F.scaled_dot_product_attention, q, k, v, causal_lower_right(512, 4608), scale=problem.scale)
        others = {"SDPA bf16": microseconds([flash])}
        yield Row(
            "prefill attention", f"512 after 4096 {format}", us, error, None, None, problem.flops / us / 1e6, others
        )

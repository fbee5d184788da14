"""Weights of each format at small and large M, beside cuBLAS and PyTorch's own; whole layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measuring import problems
from ..measuring.chain import chain
from ..measuring.timing import microseconds
from ..products.matmul_triton import linear_fused, linear_partials, linear_triton
from ..rows.activations import SummedRows
from ..tune_layer import kind_of
from ..tuning import HopperConfig, SkinnyConfig, planes_config, skinny_or_hopper, table
from .row import Row, checked, relative_error


def matmul_rows(format: str, rows: tuple[int, ...]) -> Iterator[Row]:
    """The matrices of a 7B decoder; beside ours cuBLAS in bf16, and for int4 PyTorch's own int4 product (tinygemm)."""
    for name, (n, k) in problems.SHAPES.items():
        for m in rows:
            problem = problems.matmul(format, m, n, k)
            weight = problem.weights[0].dequantize(torch.float32)
            want = problem.x.float() @ weight.t()
            got = linear_triton(problem.x, problem.weights[0], None)
            error = checked(relative_error(got, want), 5e-3, f"{format} {name} M={m}")
            us = microseconds(problem.calls(partial(linear_triton, bias=None)))
            split = m <= (256 if format == "int4" else 64)  # where a consumer may be given partials
            partials = microseconds(problem.calls(linear_partials)) if split else None
            dense = [weight.bfloat16() for _ in range(max(2, min(6, (512 << 20) // (2 * n * k))))]
            others = {"cuBLAS bf16": microseconds([partial(F.linear, problem.x, w) for w in dense])}
            if (tiles := tiles_alone(format, m, n, k)) is not None:
                got = linear_fused(problem.x, problem.weights[0], None, tiles)
                checked(relative_error(got, want), 5e-3, f"{format} {name} M={m} by the tiles chosen alone")
                others["ours, tiles chosen alone"] = microseconds(problem.calls(partial(linear_partials, config=tiles)))
            if format == "int4" and m <= 16:
                others["tinygemm"] = tinygemm(problem.x, n, k)
                if isinstance(planes_config(m, n, k, problem.group_size), SkinnyConfig):  # the other takes none
                    others["ours, sums given"] = microseconds(with_sums(problem))
            yield Row(
                f"A16W{ {'bf16': 16, 'int8': 8, 'int4': 4}[format] }", f"{name} M={m}", us, error, partials,
                problem.nbytes / us / 1e6, problem.flops / us / 1e6 if m > 64 else None, others,
            )


def tiles_alone(format: str, m: int, n: int, k: int) -> SkinnyConfig | HopperConfig | None:
    """The fastest where nothing reads the product: those in use are chosen by the time of whole layers, or by rule."""
    found = table("alone").get((kind_of(format, m), m, n, k))
    return None if found is None else skinny_or_hopper(found)


def with_sums(problem: problems.Matmul) -> problems.Calls:
    """The partials where whoever made x has summed its groups too."""
    sums = problem.x.float().unflatten(1, (-1, problem.group_size)).sum(-1).t().contiguous()
    return [partial(linear_partials, SummedRows(problem.x, sums), weight) for weight in problem.weights]


def layer_rows() -> Iterator[Row]:
    """A whole decoder layer in a step of decodes, 640 tokens of context each, in bf16 or as named; beside it cuBLAS's
    four bf16 products alone."""
    for m in (1, 8, 64):
        calls = [
            partial(F.linear, *(torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n)))
            for _ in range(2)
            for n, k in problems.SHAPES.values()
        ]
        products = microseconds(calls) * len(problems.SHAPES)
        del calls
        for format, kv in (
            ("bf16", "bf16"), ("w8a8" if m > 16 else "int8", "bf16"), ("int4", "bf16"), ("int4", "int8"),
        ):  # fmt: skip
            with torch.inference_mode():
                us = chain(format, m, 2 if format == "bf16" else 4, kv).microseconds()
            what = f"{format} M={m}" + ("" if kv == "bf16" else f" KV {kv}")
            yield Row("layer", what, us, 0.0, others={"cuBLAS bf16, products only": products})


def tinygemm(x: Tensor, n: int, k: int) -> float:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = [torch._convert_weight_to_int4pack(codes, 8) for _ in range(max(2, (256 << 20) // (n * k // 2)))]
    scales = torch.rand(k // 128, n, 2, device="cuda").bfloat16()
    return microseconds([lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in packed])  # type: ignore[misc]


def slope_rows() -> Iterator[Row]:
    """Bandwidth from two sizes, so that what a launch costs anyway cancels: A16W4, M = 1."""
    times = []
    for n, k in problems.SLOPE:
        problem = problems.matmul("int4", 1, n, k)
        tiles = tiles_alone("int4", 1, n, k)
        us = microseconds(problem.calls(partial(linear_partials, config=tiles)), at_least_us=10_000.0)
        times.append((us, problem.weights[0].nbytes))
    (short, few), (long, many) = times
    yield Row(
        "A16W4", "slope M=1, 8192x28672 to 8192x57344", long - short, 0.0, tb_per_s=(many - few) / (long - short) / 1e6
    )

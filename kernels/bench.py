"""python -m kernels.bench [--op ...] [--json FILE]: every kernel against its reference, its ceiling and what else there
is.

Correctness comes first: a row whose result is wrong has no time. Times are medians of CUDA-graph replays over rotating
inputs (`timing`), in microseconds for the complete operation; for a split-K matmul "partials" is the time without the
reduction, which a fused consumer does instead. "of read" is bytes over time over the read bandwidth measured in the
same run, "of matrix" the same for bf16 matrix products.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import activations, elementwise, problems
from .activations import Activations, SummedRows, activation_codes, quantize_rows
from .attention import attend
from .chain import chain
from .decode_triton import decode_triton
from .kv_cache import KV_FORMATS, read_kv
from .matmul import linear
from .matmul_triton import linear_8_bit, linear_fused, linear_partials, linear_triton
from .packing import PackedWeight
from .prefill_triton import prefill_triton
from .timing import matmul_rate, microseconds, read_bandwidth
from .tuning import a8w8_config


@dataclass
class Row:
    """One measured problem. Fields that were not measured are None and are left out of the table."""

    op: str
    problem: str
    us: float
    error: float  # relative to float64 (float32 for large products), Frobenius
    partials_us: float | None = None
    tb_per_s: float | None = None
    tera_ops: float | None = None
    others: dict[str, float] = field(default_factory=dict)  # microseconds of other implementations of the same problem


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def checked(error: float, bound: float, what: str) -> float:
    if not error < bound:
        raise AssertionError(f"{what}: relative error {error:.2e}, the bound is {bound:.0e}")
    return error


def matmul_rows(format: str, rows: tuple[int, ...]) -> list[Row]:
    """The matrices of a 7B decoder; beside ours cuBLAS in bf16, and for int4 PyTorch's own int4 product (tinygemm)."""
    found = []
    for name, (n, k) in problems.SHAPES.items():
        for m in rows:
            problem = problems.matmul(format, m, n, k)
            weight = problem.weights[0].dequantize(torch.float32)
            error = checked(
                relative_error(linear_triton(problem.x, problem.weights[0], None), problem.x.float() @ weight.t()),
                5e-3,
                f"{format} {name} M={m}",
            )
            us = microseconds(problem.calls(partial(linear_triton, bias=None)))
            small = m <= 64
            partials = microseconds(problem.calls(linear_partials)) if small else None
            dense = [weight.bfloat16() for _ in range(max(2, min(6, (512 << 20) // (2 * n * k))))]
            others = {"cuBLAS bf16": microseconds([partial(F.linear, problem.x, w) for w in dense])}
            if format == "int4" and m <= 16:
                others["tinygemm"] = tinygemm(problem.x, n, k)
                others["ours, sums given"] = microseconds(with_sums(problem))
            found.append(
                Row(
                    f"A16W{ {'bf16': 16, 'int8': 8, 'int4': 4}[format] }", f"{name} M={m}", us, error, partials,
                    problem.nbytes / us / 1e6, problem.flops / us / 1e6 if m > 64 else None, others,
                )
            )
            print_row(found[-1])
    return found


def with_sums(problem: problems.Matmul) -> problems.Calls:
    """The partials where whoever made x has summed its groups too."""
    sums = problem.x.float().unflatten(1, (-1, problem.group_size)).sum(-1).t().contiguous()
    return [partial(linear_partials, SummedRows(problem.x, sums), weight) for weight in problem.weights]


def layer_rows() -> list[Row]:
    """A whole decoder layer in a step of decodes, 640 tokens of bf16 context each; beside it cuBLAS's four bf16
    products alone."""
    found = []
    with torch.inference_mode():
        for m in (1, 8, 64):
            calls = [
                partial(F.linear, *(torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n)))
                for _ in range(2)
                for n, k in problems.SHAPES.values()
            ]
            products = microseconds(calls) * len(problems.SHAPES)
            del calls
            for format in ("bf16", "w8a8" if m > 16 else "int8", "int4"):
                us = chain(format, m, 2 if format == "bf16" else 4).microseconds()
                row = Row("layer", f"{format} M={m}", us, 0.0, others={"cuBLAS bf16, products only": products})
                found.append(row)
                print_row(row)
    return found


def tinygemm(x: Tensor, n: int, k: int) -> float:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = [torch._convert_weight_to_int4pack(codes, 8) for _ in range(max(2, (256 << 20) // (n * k // 2)))]
    scales = torch.rand(k // 128, n, 2, device="cuda").bfloat16()
    return microseconds([lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in packed])  # type: ignore[misc]


def slope_rows() -> list[Row]:
    """Bandwidth from two sizes, so that what a launch costs anyway cancels: A16W4, M = 1."""
    times = []
    for n in (28672, 57344):
        problem = problems.matmul("int4", 1, n, 8192)
        times.append(
            (microseconds(problem.calls(lambda x, w: linear_partials(x, w))), problem.weights[0].nbytes)
        )
    (short, few), (long, many) = times
    row = Row(
        "A16W4", "slope M=1, 8192x28672 to 8192x57344", long - short, 0.0, tb_per_s=(many - few) / (long - short) / 1e6
    )
    print_row(row)
    return [row]


def decode_rows() -> list[Row]:
    """32 query heads, 8 KV heads, head_dim 128, blocks of 64 tokens; beside ours scaled_dot_product_attention on
    contiguous bf16."""
    found = []
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
            found.append(
                Row(
                    "decode attention", f"{batch} x {context} {format}", us, error, None, problem.nbytes / us / 1e6,
                    None, others,
                )
            )
            print_row(found[-1])
    return found


def prefill_rows() -> list[Row]:
    """512 new tokens behind 4096 cached ones; beside ours PyTorch's flash attention on contiguous bf16, causal at the
    lower right."""
    from torch.nn.attention.bias import causal_lower_right

    found = []
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
        found.append(
            Row(
                "prefill attention", f"512 after 4096 {format}", us, error, None, None, problem.flops / us / 1e6, others
            )
        )
        print_row(found[-1])
    return found


def a8w8_rows() -> list[Row]:
    """int8 8192^3 with the scaled bf16 epilogue; beside ours _int_mm without one, and fp8 by _scaled_mm with row-wise
    scales."""
    x, weight = problems.int8_matmul(8192, 8192, 8192)
    few = Activations(x.codes[:64], x.scale[:64], x.dtype)
    want = few.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    error = checked(relative_error(linear_8_bit(x, weight)[:64], want), 3e-3, "A8W8")
    flops = 2 * 8192**3
    x8, w8 = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(8192, 1, device="cuda")
    us = microseconds([lambda: linear_8_bit(x, weight)])
    others = {
        "_int_mm (int32 out)": microseconds([lambda: torch._int_mm(x.codes, weight.data.t())]),
        "fp8 _scaled_mm": microseconds(
            [lambda: torch._scaled_mm(x8, w8.t(), ones, ones.t(), out_dtype=torch.bfloat16)]
        ),
    }
    row = Row("A8W8", "8192^3", us, error, None, None, flops / us / 1e6, others)
    print_row(row)
    return [row]


def eight_bit_rows(format: str, rows: tuple[int, ...]) -> list[Row]:
    """w8a8 or fp8 as `linear` computes it from bf16, the rounding of activations included where it rounds them. Beside
    it the two ways apart, to see where the crossover lies, and cuBLAS in bf16."""
    found = []
    codes = activation_codes(format, 1 << 20)
    assert codes is not None
    for name, (n, k) in problems.SHAPES.items():
        for m in rows:
            problem = problems.matmul(format, m, n, k)
            weight = problem.weights[0].dequantize()
            eight = quantize_rows(problem.x, codes)

            def run(x: Tensor, w: PackedWeight) -> Tensor:
                return linear(x, w)

            held = problem.x.float() if activation_codes(format, m) is None else eight.dequantize(torch.float32)
            got = run(problem.x, problem.weights[0])
            error = checked(relative_error(got, held @ weight.t()), 5e-3, f"{format} {name} M={m}")
            us = microseconds(problem.calls(run))
            others = {"8-bit product": microseconds([partial(linear_8_bit, eight, w) for w in problem.weights])}
            if format == "fp8":  # which is cuBLAS's
                ours = a8w8_config(m, n, k, integer=False)
                others["ours"] = microseconds([partial(linear_8_bit, eight, w, None, ours) for w in problem.weights])
            if m <= 64:
                others["A16W8"] = microseconds(problem.calls(linear_fused))
            dense = [weight.bfloat16() for _ in range(max(2, min(6, (512 << 20) // (2 * n * k))))]
            others["cuBLAS bf16"] = microseconds([partial(F.linear, problem.x, w) for w in dense])
            tera_ops = problem.flops / us / 1e6 if m > 64 else None
            found.append(
                Row(format, f"{name} M={m}", us, error, None, problem.nbytes / us / 1e6, tera_ops, others)
            )
            print_row(found[-1])
    return found


def elementwise_rows() -> list[Row]:
    """The operations between the products, at 4096 tokens of a 7B model (bytes read and written over time)."""
    found = []
    t, d, i = 4096, 4096, 14336
    sets = [[torch.randn(t, size, device="cuda", dtype=torch.bfloat16) for size in (d, d, 2 * i)] for _ in range(3)]
    weight = torch.randn(d, device="cuda", dtype=torch.bfloat16)

    def row(name: str, nbytes: int, run: Callable[..., object], error: float) -> None:
        us = microseconds([lambda s=s: run(*s) for s in sets])  # type: ignore[misc]
        found.append(Row(name, f"{t} tokens", us, checked(error, 5e-3, name), None, nbytes / us / 1e6))
        print_row(found[-1])

    x, residual, gate_up = sets[0]
    row(
        "add + RMSNorm",
        8 * t * d,
        lambda x, r, g: elementwise.add_rms_norm(x, r, weight, 1e-5),
        relative_error(
            elementwise.add_rms_norm(x, residual, weight, 1e-5)[0],
            elementwise.add_rms_norm(x, residual, weight, 1e-5, impl="torch")[0],
        ),
    )
    row(
        "SiLU-mul",
        6 * t * i,
        lambda x, r, g: elementwise.silu_mul(g),
        relative_error(elementwise.silu_mul(gate_up), elementwise.silu_mul(gate_up, impl="torch")),
    )

    def of_codes(got: Activations, want: Tensor) -> float:
        """Rounding itself errs by up to 3 %: a hundredth is left for what comes before."""
        held = quantize_rows(want, got.codes.dtype, impl="torch").dequantize(torch.float32)
        return relative_error(got.dequantize(torch.float32), held)

    for codes, short in ((torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")):
        row(
            f"add + RMSNorm to {short}",
            7 * t * d,
            partial(lambda codes, x, r, g: activations.quantized_add_rms_norm(x, r, weight, 1e-5, codes), codes),
            of_codes(
                activations.quantized_add_rms_norm(x, residual, weight, 1e-5, codes)[0],
                elementwise.rms_norm((x + residual).float(), weight.float(), 1e-5, impl="torch"),
            ),
        )
        row(
            f"SiLU-mul to {short}",
            5 * t * i,
            partial(lambda codes, x, r, g: activations.quantized_silu_mul(g, codes), codes),
            of_codes(
                activations.quantized_silu_mul(gate_up, codes), elementwise.silu_mul(gate_up.float(), impl="torch")
            ),
        )
        row(
            f"quantize rows to {short}",
            3 * t * d,
            partial(lambda codes, x, r, g: quantize_rows(x, codes), codes),
            of_codes(quantize_rows(x, codes), x.float()),
        )
    return found


OPS: dict[str, Callable[[], list[Row]]] = {
    "int4": lambda: matmul_rows("int4", (1, 16, 64, 256, 2048)),
    "slope": slope_rows,
    "bf16": lambda: matmul_rows("bf16", (1, 16, 64)),
    "int8": lambda: matmul_rows("int8", (1, 16, 64)),
    "layer": layer_rows,
    "a8w8": a8w8_rows,
    "w8a8": lambda: eight_bit_rows("w8a8", (16, 32, 64, 256, 2048)),
    "fp8": lambda: eight_bit_rows("fp8", (1, 16, 32, 64, 256, 2048)),
    "decode": decode_rows,
    "prefill": prefill_rows,
    "elementwise": elementwise_rows,
}


def print_row(row: Row) -> None:
    parts = [f"{row.op:18} {row.problem:36} {row.us:9.2f} us"]
    parts += [f"(partials {row.partials_us:.2f})"] if row.partials_us is not None else []
    parts += [f"{row.tb_per_s:.2f} TB/s"] if row.tb_per_s is not None else []
    parts += [f"{row.tera_ops:.0f} Tera-op/s"] if row.tera_ops is not None else []
    parts += [f"error {row.error:.0e}"] if row.error else []
    parts += [f"{name} {us:.2f}" for name, us in row.others.items()]
    print("  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--json", help="write the rows here")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "kernels.bench measures CUDA kernels, and PyTorch sees no CUDA device here.\n")
    torch.manual_seed(0)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "seed": 0,
        "command": "python -m kernels.bench --op " + " ".join(chosen.op),
        "read_tb_per_s": read_bandwidth(),
        "matmul_tflops": matmul_rate(),
    }
    print(
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}; "
        f"ceilings: read {about['read_tb_per_s']:.2f} TB/s, bf16 matrix {about['matmul_tflops']:.0f} TFLOP/s",
        flush=True,
    )
    rows = [row for op in chosen.op for row in OPS[op]()]
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({**about, "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()

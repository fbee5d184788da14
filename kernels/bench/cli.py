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
from collections.abc import Callable, Iterable

import torch
import triton

from ..measuring.timing import matmul_rate, read_bandwidth
from .attention import decode_rows, prefill_rows, ragged_rows
from .eight_bits import a8w8_rows, eight_bit_rows
from .elementwise import elementwise_rows
from .matmul import layer_rows, matmul_rows, slope_rows
from .row import Ceilings, Row, line

OPS: dict[str, Callable[[], Iterable[Row]]] = {
    "int4": lambda: matmul_rows("int4", (1, 16, 64, 256, 2048)),
    "slope": slope_rows,
    "bf16": lambda: matmul_rows("bf16", (1, 16, 64)),
    "int8": lambda: matmul_rows("int8", (1, 16, 64)),
    "layer": layer_rows,
    "a8w8": a8w8_rows,
    "w8a8": lambda: eight_bit_rows("w8a8", (16, 32, 64, 256, 2048)),
    "fp8": lambda: eight_bit_rows("fp8", (1, 16, 32, 64, 256, 2048)),
    "w4a8": lambda: eight_bit_rows("w4a8", (16, 64, 128, 256, 512, 2048)),
    "decode": decode_rows,
    "ragged": ragged_rows,
    "prefill": prefill_rows,
    "elementwise": elementwise_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--json", help="write the rows here")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "kernels.bench measures CUDA kernels, and PyTorch sees no CUDA device here.\n")
    torch.manual_seed(0)
    ceilings = Ceilings(read_bandwidth(), matmul_rate())
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "seed": 0,
        "command": "python -m kernels.bench --op " + " ".join(chosen.op),
        "read_tb_per_s": ceilings.read,
        "matmul_tflops": ceilings.matrix,
    }
    print(
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}; "
        f"ceilings: read {ceilings.read:.2f} TB/s, bf16 matrix {ceilings.matrix:.0f} TFLOP/s",
        flush=True,
    )
    rows = []
    for op in chosen.op:
        for row in OPS[op]():
            print(line(row, ceilings), flush=True)
            rows.append(row.record(ceilings))
        if chosen.json:  # after each operation: a run that is stopped keeps what it measured
            with open(chosen.json, "w") as file:
                json.dump({**about, "rows": rows}, file, indent=1)

"""python -m kernels.tune_layer: choose among the fastest tiles of `kernels.tune` by the time of whole decoder layers.

A product alone tells half of it: the splits of K are paid for by the kernel that reads them, and how evenly programs
spread over the multiprocessors depends on the kernel before (4096 x 14336 in int4 at M = 1 by 256 programs: 10 us
behind a norm, 15 behind SiLU-mul, where 1024 small ones take 10 behind either, on an H200). So here a chain of layers
is replayed as a graph, as the engine does, and one product's tiles are changed at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from . import problems
from .activations import activation_codes, quantize_rows
from .chain import Chain, chain
from .matmul import linear
from .tune import write_entries
from .tuning import table
from .weights import WEIGHT_FORMATS

Problem = tuple[Any, ...]  # (kind, m, n, k), the key of a tuned entry
NAMES = ("gate_up", "down", "qkv", "o")


def kind_of(format: str, m: int) -> str:
    """The kind of tuned entry that a decode product of that format reads."""
    grouped = WEIGHT_FORMATS[format].grouped
    if activation_codes(format, m) is not None:
        return "a8w4" if grouped else "a8w8"
    return "planes" if grouped else "bf16" if format == "bf16" else "int8"


def candidates(records: list[dict[str, Any]], problem: Problem, most: int = 9) -> list[dict[str, int]]:
    """The configurations of a problem worth a try: the fastest alone, the fastest of those with many warps in flight,
    and the one in use."""
    kind, m, n, _ = problem
    known = [r for r in records if (r["op"], r.get("n"), r.get("k")) == (kind, n, problem[3])]
    at = m if any(r["m"] == m for r in known) else min((r["m"] for r in known if r["m"] < m), default=m)
    ranked = [r["config"] for r in sorted(known, key=lambda r: r["us"]) if r["m"] == at]
    many = [c for c in ranked if -(-n // c["block_n"]) * c["splits"] * c["warps"] >= 900]
    found = [c for c in [table().get(problem)] if c is not None]
    for config in ranked[:most] + many[: most // 2]:
        if config not in found:
            found.append(config)
    return found


def _compile(job: tuple[str, list[tuple[Problem, dict[str, int]]]]) -> None:
    """Compile what a chain will use, in a process of its own: Triton keeps it on disk."""
    format, configs = job
    for problem, config in configs:
        _, m, n, k = problem
        table()[problem] = config
        one = problems.matmul(format, m, n, k, copies=1)
        codes = activation_codes(format, m)
        try:
            linear(one.x if codes is None else quantize_rows(one.x, codes), one.weights[0], partial=True)
        except Exception as error:  # more shared memory than there is; the timing pass leaves it out
            print(f"skipped {problem} {config}: {str(error)[:80]}", flush=True)
    torch.cuda.synchronize()


def descend(built: Chain, format: str, m: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change one product's configuration at a time, twice around, keeping what makes the layer faster."""
    kind = kind_of(format, m)
    best, entries = built.microseconds(), {}
    first = best
    for _ in range(2):
        for name in NAMES:
            problem = (kind, m, *problems.SHAPES[name])
            held = table().get(problem)
            for config in candidates(records, problem):
                table()[problem] = config
                try:
                    us = built.microseconds()
                except Exception as error:
                    if "shared memory" not in str(error) and "out of resource" not in str(error):
                        raise
                    continue
                if us < best * 0.998:
                    best, held = us, config
            if held is not None:
                table()[problem] = held
                entries[problem] = {"kind": kind, "problem": list(problem[1:]), "config": held, "us": round(best, 2)}
    print(f"{format} M={m}: a layer takes {best:.2f} us, before {first:.2f}", flush=True)
    return list(entries.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", nargs="+", required=True, help="JSON files of `kernels.tune --json`")
    parser.add_argument("--runs", nargs="+", default=["int4:1", "int4:8", "int4:16", "int4:64", "bf16:1", "bf16:16"])
    parser.add_argument("--write", action="store_true", help="write this GPU's file in kernels/tuned")
    parser.add_argument("--workers", type=int, default=12)
    chosen = parser.parse_args()
    records = []
    for path in chosen.records:
        with open(path) as file:
            records += json.load(file)["records"]
    runs = [(format, int(m)) for format, _, m in (run.partition(":") for run in chosen.runs)]
    begin = time.time()
    jobs = [
        (format, [(problem, config) for config in candidates(records, problem)])
        for format, m in runs
        for problem in ((kind_of(format, m), m, *problems.SHAPES[name]) for name in NAMES)
    ]
    with ProcessPoolExecutor(chosen.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    found = []
    with torch.inference_mode():
        for format, m in runs:
            found += descend(chain(format, m, 2 if format == "bf16" else 4), format, m, records)
    print(f"done in {time.time() - begin:.0f} s", flush=True)
    if chosen.write:
        write_entries(found, "python -m kernels.tune_layer --write; us: of a whole decoder layer")


if __name__ == "__main__":
    main()

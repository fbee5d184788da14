"""python -m kernels.tune: find the fastest tiles on this GPU and print them as data for `tuning.py`.

Never runs inside a request. Candidates are compiled by several processes first (Triton keeps what they compile on disk), then timed
one at a time.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from random import Random
from typing import Any

import torch

from . import problems
from .a16w4 import a16w4_partials
from .decode_triton import decode_triton
from .skinny import skinny_partials
from .timing import microseconds
from .tuning import DecodeConfig, SkinnyConfig

Task = tuple[str, dict[str, Any], list[Any]]  # operation, arguments of its problem, candidates


def planes_candidates(m: int) -> list[SkinnyConfig]:
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if m <= 16:
        return [SkinnyConfig(bm, bn, s, w, st) for bn, w, st, s in product((32, 64, 128), (1, 2, 4), (3, 4, 5), (1, 2, 3, 4, 6, 8, 10, 16))
                if 16 <= bn // w <= 64]
    return [SkinnyConfig(b, bn, s, w, st) for b, bn, w, st, s in product((bm // 2, bm), (64, 128), (2, 4, 8), (2, 3, 4), (1, 2, 4))
            if 16 <= bn // w]


def plain_candidates(m: int, element_bytes: int) -> list[SkinnyConfig]:
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    if element_bytes == 2:
        shapes = [(bn, bk, w, st) for bn, bk, w, st in product((8, 16, 32, 64), (128, 256, 512), (1, 2, 4), (2, 3, 4, 5, 6)) if 4096 <= bn * bk * st <= 49152]
    else:
        shapes = [(bn, bk, w, st) for bn, bk, w, st in product((16, 32, 64, 128), (128, 256, 512), (1, 2, 4), (2, 3, 4, 5)) if 8192 <= bn * bk * st <= 98304]
    return [SkinnyConfig(bm, bn, s, w, st, bk) for (bn, bk, w, st), s in product(shapes, (1, 2, 4))]


def decode_candidates(batch: int, kv_heads: int) -> list[DecodeConfig]:
    wanted = [max(1, round(132 * c / (batch * kv_heads))) for c in (1, 2, 3, 4, 6, 8)]
    return [DecodeConfig(tile, s, 128, w, st, registers)
            for tile, w, st, s, registers in product((32, 64, 128), (1, 2, 4), (2, 3, 4), sorted(set(wanted)), (None, 128, 168))
            if 16 <= tile // w <= 64]


def _runner(op: str, arguments: dict[str, Any]) -> Callable[[Any], problems.Calls]:
    if op == "decode":
        decode = problems.decode(**arguments)
        return lambda config: decode.calls(lambda *a: decode_triton(*a, config=config))
    problem = problems.matmul(**arguments)
    run = a16w4_partials if arguments["format"] == "int4" else skinny_partials
    return lambda config: problem.calls(lambda x, w: run(x, w, config))


def _compile(job: tuple[str, dict[str, Any], list[Any]]) -> None:
    op, arguments, configs = job
    calls = _runner(op, arguments)
    for config in configs:
        try:
            calls(config)[0]()
        except Exception as error:  # a candidate that needs more shared memory than there is; the timing pass reports it
            print(f"skipped {op} {arguments} {config}: {str(error)[:80]}", flush=True)
    torch.cuda.synchronize()


def run(tasks: Iterable[Task], workers: int) -> list[dict[str, Any]]:
    """Time every candidate of every task: one record per candidate, fastest first within its task."""
    tasks = list(tasks)
    begin = time.time()
    if workers > 1:
        jobs = [(op, arguments, configs[i::workers]) for op, arguments, configs in tasks for i in range(workers)]
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, jobs))
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    records = []
    for op, arguments, configs in tasks:
        calls = _runner(op, arguments)
        timed = []
        for config in configs:
            try:
                timed.append((microseconds(calls(config), replays=3, at_least_us=600.0), config))
            except Exception as error:
                if "shared memory" not in str(error) and "out of resource" not in str(error):
                    raise
        timed.sort(key=lambda pair: pair[0])
        for us, config in timed[:3]:
            print(f"{op} {arguments} {us:8.2f} us {config}", flush=True)
        records += [{"op": op, **arguments, "us": us, "config": asdict(config)} for us, config in timed]
        del calls
    print(f"timed in {time.time() - begin:.0f} s", flush=True)
    return records


def tasks(ops: list[str], most: int) -> list[Task]:
    """What is tuned: the shapes of `problems.SHAPES` at the M where a configuration changes, and decode attention;
    at most `most` candidates of each, drawn with a fixed seed."""
    found: list[Task] = []
    for format, element_bytes, rows in (("int4", 0, (1, 16)), ("bf16", 2, (1, 16)), ("int8", 1, (1, 16, 64))):
        if format in ops:
            for m, (n, k) in product(rows, problems.SHAPES.values()):
                found.append(("matmul", {"format": format, "m": m, "n": n, "k": k},
                              planes_candidates(m) if format == "int4" else plain_candidates(m, element_bytes)))
    if "decode" in ops:
        for format, (batch, context) in product(("bf16", "int8", "int4"), ((1, 8192), (16, 2048), (64, 2048))):
            found.append(("decode", {"format": format, "batch": batch, "context": context}, decode_candidates(batch, 8)))
    return [(op, arguments, configs if len(configs) <= most else Random(0).sample(configs, most)) for op, arguments, configs in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="*", default=["int4", "bf16", "int8", "decode"])
    parser.add_argument("--json", help="write every timing here")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--most", type=int, default=150, help="candidates per problem")
    chosen = parser.parse_args()
    records = run(tasks(chosen.op, chosen.most), chosen.workers)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "records": records}, file)


if __name__ == "__main__":
    main()

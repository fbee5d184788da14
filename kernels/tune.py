"""python -m kernels.tune: find the fastest tiles on this GPU and print them as data for `tuning.py`.

Never runs inside a request. Candidates are compiled by several processes first (Triton keeps what they compile on
disk), then timed one at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from random import Random
from typing import Any

import torch
import triton
from torch import Tensor

from .candidates import (
    MOST_FEW_ROWS,
    a8w4_candidates,
    a8w8_candidates,
    decode_candidates,
    matmul_candidates,
    neighbours,
    prefill_candidates,
)
from .measuring import problems
from .measuring.timing import microseconds
from .paged.decode_triton import decode_triton
from .paged.kv_cache import KV_FORMATS
from .paged.prefill_triton import prefill_triton
from .products.a8w4 import a8w4_partials
from .products.a8w8 import a8w8_partials
from .products.a16w4 import reduce_splits
from .products.matmul_triton import linear_8_bit, linear_partials
from .rows.elementwise_triton import add_rms_norm, silu_mul
from .rows.rounding import quantize_rows
from .triton_common import warp_group_products
from .tuning import TUNED, skinny_or_hopper

Task = tuple[str, dict[str, Any], list[Any]]  # operation, arguments of its problem, candidates
FORMATS = {
    "planes": "int4", "wide": "int4", "hopper": "int4", "pairs": "int8", "pairs_hopper": "int8", "int8": "w8a8",
}  # fmt: skip
"""The weights that a kind of entry is tuned with, where they are not called the same: plain int8 is that of w8a8."""


def _runner(op: str, arguments: dict[str, Any], alone: bool = False) -> Callable[[Any], problems.Calls]:
    if op == "decode":
        decode = problems.decode(**arguments)
        return lambda config: decode.calls(partial(decode_triton, config=config))
    if op == "prefill":
        prefill = problems.prefill(**arguments)
        return lambda config: prefill.calls(partial(prefill_triton, config=config))
    arguments = dict(arguments)
    if op == "a8w8" and arguments["m"] == 8192:
        int8 = problems.int8_matmul(**arguments)
        return lambda config: [partial(linear_8_bit, *int8, None, config)]
    if op == "a8w8":
        eight = problems.matmul(arguments.pop("format", "w8a8"), **arguments)
        rows = quantize_rows(eight.x, eight.weights[0].data.dtype)
        consume = _consumer(eight)
        return lambda config: [partial(_both, a8w8_partials, rows, weight, config, consume) for weight in eight.weights]
    if op == "a8w4":
        four = problems.matmul("w4a8", **arguments)
        rows = quantize_rows(four.x, torch.int8)
        consume = _consumer(four)
        return lambda config: [partial(_both, a8w4_partials, rows, weight, config, consume) for weight in four.weights]
    problem = problems.matmul(**arguments)
    x, consume = problem.x, (lambda y: y) if alone else _consumer(problem)
    return lambda config: [partial(_both, linear_partials, x, weight, config, consume) for weight in problem.weights]


def _both(
    product: Callable[..., Tensor], x: Any, weight: Any, config: Any, consume: Callable[[Tensor], object]
) -> None:
    consume(product(x, weight, config))


def _consumer(problem: problems.Matmul) -> Callable[[Tensor], object]:
    """What reads the product in a decoder, since it pays for every split: the next norm behind o and down, an
    elementwise kernel behind qkv and gate_up, the sum alone behind the lm_head."""
    n, k = problem.n, problem.k
    if (n, k) == problems.HEAD:
        return lambda y: reduce_splits(y) if y.shape[0] > 1 else y
    if n > k:
        return lambda y: silu_mul(y if y.shape[0] > 1 else y[0])
    residual, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((problem.m, n), (n,)))
    return lambda y: add_rms_norm(y if y.shape[0] > 1 else y[0], residual, weight, 1e-5)


def _compile(job: tuple[str, dict[str, Any], list[Any], bool]) -> None:
    op, arguments, configs, alone = job
    calls = _runner(op, arguments, alone)
    for config in configs:
        try:
            calls(config)[0]()
        except Exception as error:  # mostly a candidate that is `too_large`; of others the timing pass says more
            print(f"skipped {op} {arguments} {config}: {str(error)[:80]}", flush=True)
    torch.cuda.synchronize()


def too_large(error: Exception) -> bool:
    """Whether all that is wrong with a candidate is that it needs more shared memory, or, by ptxas, more registers than
    there are."""
    return any(words in str(error) for words in ("shared memory", "out of resource", "PTXAS error"))


def run(tasks: Iterable[Task], workers: int, alone: bool = False) -> list[dict[str, Any]]:
    """Time every candidate of every task: one record per candidate, fastest first within its task. alone: without what
    reads a product."""
    tasks = list(tasks)
    begin = time.time()
    if workers > 1:
        jobs = [
            (op, arguments, configs[i::workers], alone)
            for op, arguments, configs in tasks
            for i in range(min(workers, len(configs)))
        ]
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, jobs))
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    records = []
    for op, arguments, configs in tasks:
        calls = _runner(op, arguments, alone)
        timed = []
        for config in configs:
            try:
                timed.append((microseconds(calls(config), replays=3, at_least_us=600.0), config))
            except Exception as error:
                if not too_large(error):
                    raise
        timed.sort(key=lambda pair: pair[0])
        for us, config in timed[:3]:
            print(f"{op} {arguments} {us:8.2f} us {config}", flush=True)
        records += [{"op": op, **arguments, "us": us, "config": asdict(config)} for us, config in timed]
        del calls
    print(f"timed in {time.time() - begin:.0f} s", flush=True)
    return records


def tasks(kinds: list[str], most: int, hopper: bool = False, alone: bool = False) -> list[Task]:
    """What is tuned: the shapes of `problems.SHAPES` at the M where a configuration changes, and attention; at most
    `most` candidates of each problem, drawn with a fixed seed. hopper: for a GPU that has `a16w4_hopper`. alone: the
    sizes of `problems.SLOPE` too."""
    found: list[Task] = []
    rows = {
        "planes": (1, 8, 16, 32, 64), "wide": (128, 256), "hopper": (64, 128, 256, 512, 2048),
        "bf16": (1, 16, 32, 64), "int8": (1, 16), "pairs": (1, 16, 32, 64, 128, 256),
        "pairs_hopper": (64, 128, 256, 512, 2048),
        "a8w8": (64, 128, 256, 2048), "a8w4": (128, 192, 256, 512),
    }  # fmt: skip
    for kind in kinds:
        if kind == "decode":
            for format, (batch, context) in product(KV_FORMATS, ((1, 8192), (16, 2048), (64, 2048))):
                found.append(
                    (kind, {"format": format, "batch": batch, "context": context}, decode_candidates(batch, 8))
                )
        elif kind == "prefill":
            found += [
                (kind, {"format": format, "chunk": 512, "context": 4608}, prefill_candidates())
                for format in KV_FORMATS
            ]
        elif kind == "a8w4":
            found += [
                (kind, {"m": m, "n": n, "k": k}, a8w4_candidates(m))
                for m, (n, k) in product(rows[kind], problems.SHAPES.values())
            ]
        elif kind == "a8w8":
            found += [
                (kind, {"m": m, "n": n, "k": k}, a8w8_candidates(m))
                for m, (n, k) in product(rows[kind], problems.SHAPES.values())
            ]
            found.append((kind, {"m": 8192, "n": 8192, "k": 8192}, a8w8_candidates(8192)))
        else:
            format = FORMATS.get(kind, kind)
            shapes = [*problems.SHAPES.values(), *([problems.HEAD] if format in ("bf16", "int8") else [])]
            sizes = list(product(rows[kind], shapes))
            if alone and kind == "planes":
                sizes += [(1, size) for size in problems.SLOPE]
            for m, (n, k) in sizes:
                candidates = matmul_candidates(kind, m, n, hopper)
                found.append((kind, {"format": format, "m": m, "n": n, "k": k}, candidates))
    return [
        (op, arguments, configs if len(configs) <= most else Random(0).sample(configs, most))
        for op, arguments, configs in found
    ]


def second_look(records: list[dict[str, Any]], fastest: int) -> list[Task]:
    """The neighbours of the `fastest` few of each problem at few rows, where there are more candidates than are
    tried."""
    problems: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        problems.setdefault(tuple(record.get(name) for name in ("op", "format", "m", "n", "k")), []).append(record)
    found: list[Task] = []
    for (op, format, m, n, k), timed in problems.items():
        if op not in MOST_FEW_ROWS or m > MOST_FEW_ROWS[op]:
            continue
        tried = {skinny_or_hopper(record["config"]) for record in timed}
        best = sorted(timed, key=lambda record: record["us"])[:fastest]
        near = [skinny_or_hopper(other) for record in best for other in neighbours(record["config"], op, k)]
        if close := [config for config in dict.fromkeys(near) if config not in tried]:
            found.append((op, {"format": format, "m": m, "n": n, "k": k}, close))
    return found


def entries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of each problem that `tuning` looks up, as its file holds the fastest of them."""
    found = []
    for record in records:
        if record["op"] == "decode" or record.get("m") == 8192:
            continue  # decided by a rule
        problem = (record["format"], 128) if record["op"] == "prefill" else (record["m"], record["n"], record["k"])
        found.append(
            {"kind": record["op"], "problem": list(problem), "config": record["config"], "us": round(record["us"], 2)}
        )
    return found


def merged(known: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`known` with the fastest of `found` in the place of every problem that was tuned again; times of different runs
    are not compared, since the kernels may have changed in between."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in found:
        key = (entry["kind"], *entry["problem"])
        if key not in best or entry["us"] < best[key]["us"]:
            best[key] = entry
    return [entry for entry in known if (entry["kind"], *entry["problem"]) not in best] + list(best.values())


def file_text(about: dict[str, str], parts: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with one entry per line, so that a change of one configuration reads as one changed line."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    for part, found in parts.items():
        lines.append(f" {json.dumps(part)}: [\n" + ",\n".join("  " + json.dumps(entry) for entry in found) + "\n ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_entries(found: list[dict[str, Any]], command: str, part: str = "entries") -> None:
    """Merge `found` into a part of this GPU's file, see `tuning.table`; each entry says by which command it was
    chosen."""
    gpu = torch.cuda.get_device_name()
    about = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    path = TUNED / f"{gpu.replace(' ', '_')}.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    parts = {name: held.get(name, []) for name in ("entries", "alone")}
    parts[part] = merged(parts[part], [{**entry, "command": command} for entry in found])
    path.write_text(file_text(about, parts))


def kinds(hopper: bool) -> list[str]:
    """What is tuned on a GPU: of the kernels for many rows of 4-bit weights and of int8 those that run there."""
    many = ["hopper", "pairs_hopper"] if hopper else ["wide"]
    return ["planes", *many, "bf16", "int8", "pairs", "a8w8", "a8w4", "decode", "prefill"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = kinds(warp_group_products())
    parser.add_argument("--op", nargs="*", default=here, choices=here)
    parser.add_argument("--json", help="write every timing here")
    parser.add_argument("--write", action="store_true", help="write this GPU's file in kernels/tuned")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="*", help="only these M")
    parser.add_argument(
        "--alone", action="store_true",
        help="products without what reads them; --write keeps the fastest for `kernels.bench`, beside those in use",
    )  # fmt: skip
    parser.add_argument("--most", type=int, default=150, help="candidates per problem")
    parser.add_argument(
        "--near", type=int, default=2, help="then, at few rows, neighbours of so many of the fastest"
    )
    chosen = parser.parse_args()
    found = tasks(chosen.op, chosen.most, warp_group_products(), chosen.alone)
    wanted = [task for task in found if not chosen.rows or task[1].get("m") in chosen.rows]
    records = run(wanted, chosen.workers, chosen.alone)
    if close := second_look(records, chosen.near):
        records += run(close, chosen.workers, chosen.alone)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "records": records}, file)
    if chosen.write and chosen.alone:
        write_entries(entries(records), "python -m kernels.tune --alone --write; us: a product alone", "alone")
    elif chosen.write:
        write_entries(entries(records), "python -m kernels.tune --write; us: a product and what reads it, or alone")


if __name__ == "__main__":
    main()

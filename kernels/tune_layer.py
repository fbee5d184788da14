"""python -m kernels.tune_layer: choose tiles by the time of whole decoder layers.

A product alone tells half of it: the splits of K are paid for by the kernel that reads them, and how evenly programs
spread over the multiprocessors depends on the kernel before (4096 x 14336 in int4 at M = 1 by 256 programs: 10 us
behind a norm, 15 behind SiLU-mul, where 1024 small ones take 10 behind either, on an H200) and on when that one lets
them in. So here a chain of layers is replayed as a graph, as the engine does, and one product's tiles are changed at a
time: to the fastest of `kernels.tune`, where its records are given, and to neighbours of those in use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from .candidates import aheads_of, gated_hopper_candidates, neighbours
from .measuring import problems
from .measuring.chain import Chain, chain
from .products.gated import gated_linear
from .products.matmul import linear
from .products.matmul_triton import HOPPER_SKINNY_ROWS, SKINNY_ROWS
from .rows.activations import activation_codes
from .rows.rounding import quantize_rows
from .triton_common import warp_group_products
from .tune import too_large, write_entries
from .tuning import TUNED_ROWS, table

Problem = tuple[Any, ...]  # (kind, m, n, k), the key of a tuned entry
Config = dict[str, Any]
NAMES = ("gated", "gate_up", "down", "qkv", "o")
"""The products of a layer; "gated" is gate_up with SiLU-mul in the same kernel: first, since without an entry of its
own it follows gate_up's, and nobody could say which of the two runs."""
APART = {"block_m": 16, "block_n": 64, "splits": 2, "warps": 4, "stages": 2}
"""The entry of a gated product that is better computed by two kernels: one that splits K, which it cannot."""


def kind_of(format: str, m: int) -> str:
    """The kind of tuned entry that a decode product of that format reads."""
    if activation_codes(format, m) is not None:
        return {"w4a8": "a8w4"}.get(format, "a8w8")
    if format in ("int4", "w4a8"):
        return "hopper" if m > HOPPER_SKINNY_ROWS and warp_group_products() else "planes"
    if format == "int8":
        return "pairs_hopper" if m > HOPPER_SKINNY_ROWS and warp_group_products() else "pairs"
    return "bf16" if format == "bf16" else "int8"


def problem_of(name: str, format: str, m: int) -> Problem | None:
    """The key of a product's tuned entry; None for one that the format does not have at that M."""
    kind = kind_of(format, m)
    if name != "gated":
        return (kind, m, *problems.SHAPES[name])
    own = {"hopper": "planes", "pairs_hopper": "pairs"}.get(kind, kind)  # the kernels that SiLU-mul can be part of
    takes = m <= SKINNY_ROWS and activation_codes(format, m) is None
    return (f"gated {own}", m, *problems.SHAPES["gate_up"]) if takes else None


def runs_gated(format: str, m: int) -> bool:
    """Whether gate_up and SiLU-mul are one kernel by the entry in use."""
    problem = problem_of("gated", format, m)
    return problem is not None and table().get(problem, APART)["splits"] == 1


def candidates(records: list[dict[str, Any]], problem: Problem, most: int = 9) -> list[Config]:
    """The configurations of a problem worth a try: the one in use and its neighbours, the fastest alone, and the
    fastest of those with many warps in flight."""
    kind, m, n, k = problem
    gated = kind.startswith("gated ")
    known = [r for r in records if (r["op"], r.get("n"), r.get("k")) == (kind, n, k)]
    at = m if any(r["m"] == m for r in known) else min((r["m"] for r in known if r["m"] < m), default=m)
    ranked = [r["config"] for r in sorted(known, key=lambda r: r["us"]) if r["m"] == at]
    many = [c for c in ranked if -(-n // c["block_n"]) * c["splits"] * c["warps"] >= 900]
    used = table().get(problem) or (table().get((kind.removeprefix("gated "), m, n, k)) if gated else None)
    start = [] if used is None else [used | {"splits": 1} if gated else used]
    found: list[Config] = [APART] if gated else []
    if kind in ("gated planes", "gated pairs", "gated bf16") and warp_group_products():
        found += [asdict(config) for config in gated_hopper_candidates(kind, m)]
    near = [c for one in start for c in neighbours(one, kind, k)]
    for config in start + elsewhere(problem) + near + ranked[:most] + many[: most // 2]:
        if config not in found:
            found.append(config)
    return found


class Compilers:
    """Processes that compile what a search is about to time, each a share of it and nothing twice: one after the other,
    the tiles beside those that a search has moved to would take it minutes."""

    def __init__(self, pool: Executor, workers: int) -> None:
        self._pool, self._workers = pool, workers
        self._known: set[str] = set()

    def __call__(self, format: str, wanted: list[tuple[Problem, Config]]) -> None:
        new = {key: pair for pair in wanted if (key := f"{format} {pair}") not in self._known}
        self._known |= new.keys()
        pairs = list(new.values())
        jobs = [(format, pairs[i :: self._workers]) for i in range(min(self._workers, len(pairs)))]
        begin = time.time()
        list(self._pool.map(_compile, jobs))
        print(f"{format}: {len(pairs)} tiles compiled in {time.time() - begin:.0f} s", flush=True)


def _compile(job: tuple[str, list[tuple[Problem, Config]]]) -> None:
    """Compile what a chain will use, in a process of its own: Triton keeps it on disk."""
    format, configs = job
    for problem, config in configs:
        kind, m, n, k = problem
        table()[problem] = config
        one = problems.matmul(format, m, n, k, copies=1)
        codes = activation_codes(format, m)
        try:
            if kind.startswith("gated "):
                gated_linear(one.x, one.weights[0])
            else:
                linear(one.x if codes is None else quantize_rows(one.x, codes), one.weights[0], partial=True)
        except Exception as error:  # more shared memory than there is; the timing pass leaves it out
            print(f"skipped {problem} {config}: {str(error)[:80]}", flush=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def elsewhere(problem: Problem) -> list[Config]:
    """What the same product runs at the next smaller and the next larger M that was tuned, and alone."""
    kind, m, *size = problem
    other = [rows for rows in TUNED_ROWS if table().get((kind, rows, *size)) is not None]
    near = [max((rows for rows in other if rows < m), default=m), min((rows for rows in other if rows > m), default=m)]
    found = [table()[(kind, rows, *size)] for rows in near if rows != m]
    return found + [held for held in [table("alone").get(problem)] if held is not None]


def in_use(format: str, m: int) -> dict[Problem, Config]:
    """The entries of the products that run."""
    running = [problem_of(name, format, m) for name in NAMES if name != "gate_up" or not runs_gated(format, m)]
    return {problem: table()[problem] for problem in running if problem in table()}


def jump(built: Chain, format: str, m: int, records: list[dict[str, Any]]) -> float:
    """Begin from the fastest of whole sets of tiles: those in use, those of the M beside, and the fastest alone. On the
    way from one set to another each step alone may be slower. Returns the microseconds of a layer."""
    held = in_use(format, m)
    others = {problem: elsewhere(problem) for problem in held}
    sets = [held] + [
        {problem: others[problem][i] if i < len(others[problem]) else config for problem, config in held.items()}
        for i in range(max(map(len, others.values()), default=0))
    ]
    return fastest_set(built, [*sets, {p: fastest(records, p) or config for p, config in held.items()}])


def fastest_set(built: Chain, sets: list[dict[Problem, Config]]) -> float:
    """Leave in the table that set of tiles by which a layer takes least. Returns its microseconds."""
    times = []
    for tiles in sets:
        table().update(tiles)
        times.append(built.microseconds(15))
    best = min(range(len(sets)), key=times.__getitem__)
    table().update(sets[best])
    return times[best]


def fastest(records: list[dict[str, Any]], problem: Problem) -> Config | None:
    """By the records of `kernels.tune`."""
    own = [r for r in records if (r["op"], r.get("m"), r.get("n"), r.get("k")) == problem]
    return min(own, key=lambda r: r["us"])["config"] if own else None


def ask_ahead(built: Chain, format: str, m: int) -> float:
    """Let all tuned products that run ask for their weights ahead at once, as many steps as is fastest, or as they did:
    each alone gains less than can be told from noise. Returns the microseconds of a layer."""
    held, aheads = in_use(format, m), aheads_of(kind_of(format, m))
    return fastest_set(
        built, [held, *({p: c | {"ahead": ahead} for p, c in held.items()} for ahead in aheads)]
    )


def descend(
    built: Chain, format: str, m: int, records: list[dict[str, Any]], rounds: int = 2,
    compile_ahead: Callable[[str, list[tuple[Problem, Config]]], object] | None = None,
) -> list[dict[str, Any]]:
    """Change one product's configuration at a time, `rounds` times around, keeping what makes the layer faster.
    compile_ahead: is told what will be tried."""

    def get_ready() -> None:
        if compile_ahead is None:
            return
        problems = [problem for name in NAMES if (problem := problem_of(name, format, m)) is not None]
        compile_ahead(format, [(problem, config) for problem in problems for config in candidates(records, problem)])

    get_ready()
    first, entries = built.microseconds(), {}
    jump(built, format, m, records)
    get_ready()
    best = ask_ahead(built, format, m)
    for _ in range(rounds):
        get_ready()
        for name in NAMES:
            problem = problem_of(name, format, m)
            if problem is None or (name == "gate_up" and runs_gated(format, m)):
                continue  # what does not run would be chosen by noise
            tried = candidates(records, problem)
            held = table().get(problem)
            if name == "gated" and held is None:  # said in any case: without an entry that of a larger M is taken
                table()[problem] = held = APART
                best = built.microseconds()
            for config in tried:
                table()[problem] = config
                try:
                    us = built.microseconds()
                except Exception as error:
                    if not too_large(error):
                        raise
                    continue
                if us < best * 0.998 and (again := built.microseconds(15)) < best:
                    best, held = again, config
            if held is None:
                table().pop(problem, None)
            else:
                table()[problem] = held
                entries[problem] = {"kind": problem[0], "problem": list(problem[1:]), "config": held}
    print(f"{format} M={m}: a layer takes {best:.2f} us, before {first:.2f}", flush=True)
    return [{**entry, "us": round(best, 2)} for entry in entries.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", nargs="*", default=[], help="JSON files of `kernels.tune --json`")
    parser.add_argument("--rounds", type=int, default=2)
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
    processes = ProcessPoolExecutor(chosen.workers, mp_context=multiprocessing.get_context("spawn"))
    with processes as pool, torch.inference_mode():
        compilers = Compilers(pool, chosen.workers)
        for format, m in runs:
            layers = chain(format, m, 2 if format == "bf16" else 4)
            found = descend(layers, format, m, records, chosen.rounds, compilers)
            if chosen.write:
                write_entries(found, "python -m kernels.tune_layer --write; us: of a whole decoder layer")
    print(f"done in {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

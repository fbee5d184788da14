"""The command line: what to measure, with which configurations, and where to write it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from engine.bench.host import MOST_RUNNING, run_host
from engine.bench.kvfit import MOST_CONCURRENT, run_kvfit
from engine.bench.measure import Candidate, engine_candidate, measure, print_suite
from engine.bench.peers import PARTS, PeerSizes, run_peers
from engine.bench.reference import ContinuousCandidate, batches, generate_candidate, load_network
from engine.bench.roofline import Roofline, card, measured_bandwidth
from engine.bench.soak import run_soak
from engine.bench.switch import run_switch
from engine.bench.work import WORKS
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.loader import load_model
from engine.machine import write_report
from engine.running.device import resolve_device

SUITE_HELP = (
    "single: one request, 64 tokens in and out; mixed: 64 requests, lengths in and out uniform in [16, 128]; decodeN: "
    "N prompts of 512 tokens, 129 tokens out; peers: the workloads other engines were measured with; host: the host's "
    "cost per step at 16, 256 and 1,024 requests, no model; switch: constructor to first token, then one change of "
    "configuration after another; kvfit: requests of 1,024 tokens in the same bytes per KV format; soak: mixed traffic "
    "with random aborts for --minutes"
)

DEFAULTS = {"peers": {"max_batch_size": 256, "max_batched_tokens": 8192}}
ONE_OF = {"soak": ("weights", "kv"), "kvfit": ("weights",)}
"""What a suite takes one format of."""
LIMITS = 0.0011, 1_000_000
"""Of --memory-limit, in GB: within those of EngineConfig."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.bench",
        description="Measure the engine. Prints a roofline card first; figures are medians with their range.",
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--weights", nargs="+", default=["bf16"], help="one or more weight formats, measured in turn")
    parser.add_argument("--kv", nargs="+", default=["bf16"], help="one or more KV formats, measured in turn")
    parser.add_argument("--suite", nargs="+", default=["single"], choices=[*WORKS, *SUITES], help=SUITE_HELP)
    parser.add_argument("--repeats", type=int, help="default 5; peers 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-batch-size", type=int, help="default 64; peers 256")
    parser.add_argument("--max-batched-tokens", type=int, help="default 2048; peers 8192")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GB", help="of each engine; needed to hold several on a GPU"
    )
    parser.add_argument("--runner", default="torch", choices=["torch", "simulated"], help="what the engine runs on")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--no-graphs", action="store_true", help="every step eager")
    parser.add_argument("--no-overlap", action="store_true", help="one step at a time")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="of the suite peers")
    parser.add_argument("--divide", type=int, default=1, help="peers: every count and length divided by this")
    parser.add_argument("--concurrent", type=int, default=16, help="kvfit: requests that fit in the first format")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 256, 1024], help="host: running requests")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the suite soak")
    parser.add_argument(
        "--compare", choices=["transformers", "generate"],
        help="generate: transformers' generate in padded batches; transformers: its continuous batching too",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=writable, help="write everything with machine, versions, seed and command, after each suite"
    )
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What cannot be measured, or would be left out without a word, is refused before a model is loaded."""
    for name, most in (("repeats", None), ("divide", None), ("concurrent", MOST_CONCURRENT), ("counts", MOST_RUNNING)):
        for value in args.counts if name == "counts" else [getattr(args, name)]:
            if value is not None and (value < 1 or (most is not None and value > most)):
                limit = "at least 1" if most is None else f"from 1 to {most:,}"
                parser.error(f"--{name} is {value}; it must be {limit}")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes is {args.minutes:g}; it must be greater than 0 and finite")
    if args.memory_limit is not None and not LIMITS[0] <= args.memory_limit <= LIMITS[1]:
        parser.error(f"--memory-limit is {args.memory_limit:g} GB; it must be from {LIMITS[0]:g} to {LIMITS[1]:,}")
    timed = [suite for suite in args.suite if suite in (*WORKS, "peers", "switch")]
    if args.runner == "simulated" and timed:
        parser.error(f"--runner is 'simulated', which computes nothing that {timed[0]} could time; it must be 'torch'")
    if args.compare and not set(args.suite) & set(WORKS):
        parser.error(f"--compare is {args.compare!r}; it must come with a suite that compares: {', '.join(WORKS)}")
    for suite in args.suite:
        for name in ONE_OF.get(suite, ()):
            if len(getattr(args, name)) > 1:
                given = " ".join(getattr(args, name))
                parser.error(f"--{name} is {given!r}; it must be one format with the suite {suite}")
        try:
            for form in formats(args):
                EngineConfig(**form, **options(args, suite))
        except ConfigError as error:
            parser.error(str(error))


def options(args: argparse.Namespace, suite: str) -> dict[str, Any]:
    """Of every engine of a suite, which has defaults of its own where the command line says nothing."""
    sizes = {"max_batch_size": 64, "max_batched_tokens": EngineConfig.max_batched_tokens, **DEFAULTS.get(suite, {})}
    return {
        "model": args.model,
        "seed": args.seed,
        "runner": args.runner,
        "device": args.device,
        "graphs": not args.no_graphs,
        "overlap": not args.no_overlap,
        "memory_limit": None if args.memory_limit is None else int(args.memory_limit * 1e9),
        **{name: value if getattr(args, name) is None else getattr(args, name) for name, value in sizes.items()},
    }


def formats(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"weights": weights, "kv": kv} for weights in args.weights for kv in args.kv]


Keep = Callable[[str, Any], None]
"""Takes a suite's name and its figures as soon as they are known, and again when there are more of them."""


def side_by_side(args: argparse.Namespace, suites: Sequence[str], keep: Keep) -> None:
    """Engines of all formats and transformers, interleaved on each workload."""
    common = options(args, suites[0])
    with load_model(EngineConfig(**common)) as model, ExitStack() as stack:
        candidates: dict[str, Candidate] = {}
        engines: dict[str, dict[str, Any]] = {}
        bandwidth = measured_bandwidth(args.device)
        for form in formats(args):
            engine = stack.enter_context(Engine(EngineConfig(**form, **common), model=model))
            name, roofline = f"weights {form['weights']}, kv {form['kv']}", Roofline.of(engine, bandwidth)
            print(card(engine, roofline))
            candidates[name] = engine_candidate(engine)
            about = {"description": engine.description, "roofline": roofline.as_dict()}
            engines[name] = {"config": asdict(engine.config), **about}
        network = load_network(model, resolve_device(args.device)) if args.compare else None
        if args.compare == "transformers":
            continuous = candidates["transformers continuous, bf16"] = ContinuousCandidate(network)
            stack.callback(continuous.close)
        for suite in suites:
            work = WORKS[suite](model.spec.vocab_size, args.seed)
            tried = dict(candidates)
            for size in batches(len(work.prompts)) if args.compare else ():
                tried[f"transformers generate, bf16, batches of {size}"] = generate_candidate(model, network, size)
            results = measure(tried, work, args.repeats or 5)
            print_suite(suite, results)
            keep(suite, [asdict(result) | engines.get(result.name, {}) for result in results])


def peers(args: argparse.Namespace, keep: Keep) -> None:
    common = options(args, "peers")
    sizes = PeerSizes().divided(args.divide) if args.divide > 1 else PeerSizes()
    runs: list[dict[str, Any]] = []
    with load_model(EngineConfig(**common)) as model:
        for form in formats(args):
            config = EngineConfig(**form, **common)
            runs.append(run_peers(config, model, sizes, args.parts, args.repeats or 3, args.seed))
            keep("peers", runs)


def host(args: argparse.Namespace, keep: Keep) -> None:
    keep("host", run_host(args.counts, args.seed))


def switch(args: argparse.Namespace, keep: Keep) -> None:
    config = EngineConfig(**options(args, "switch"), weights=args.weights[0], kv=args.kv[0])
    keep("switch", run_switch(config, args.weights[1:], args.kv[1:]))


def kvfit(args: argparse.Namespace, keep: Keep) -> None:
    config = EngineConfig(**options(args, "kvfit"), weights=args.weights[0])
    with load_model(config) as model:
        keep("kvfit", run_kvfit(config, model, args.kv, args.concurrent, args.seed))


def soak(args: argparse.Namespace, keep: Keep) -> None:
    with Engine(EngineConfig(**formats(args)[0], **options(args, "soak"))) as engine:
        print(f"  {engine.description}")
        keep("soak", run_soak(engine, args.minutes, args.seed))


SUITES: dict[str, Callable[[argparse.Namespace, Keep], None]] = {
    "peers": peers,
    "host": host,
    "switch": switch,
    "kvfit": kvfit,
    "soak": soak,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    report: dict[str, Any] = {"model": args.model, "seed": args.seed, "suites": {}}

    def keep(suite: str, figures: Any) -> None:
        """Written at once: what breaks off later, an interrupt too, takes nothing with it."""
        report["suites"][suite] = figures
        if args.json:
            write_report(args.json, report, argv)

    works = [suite for suite in args.suite if suite in WORKS]
    try:
        if works:
            side_by_side(args, works, keep)
        for suite in args.suite:
            if suite in SUITES:
                print(f"{suite}:")
                SUITES[suite](args, keep)
    except (ConfigError, CheckpointError) as error:
        raise SystemExit(f"python -m engine.bench: error: {error}") from None

"""The main job in a terminal: weight formats x batching policies on the bundled model, as a table (`make demo`).

python -m workbench.demo [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from engine.config import EngineConfig
from engine.files import writable
from workbench import text
from workbench.quality import Perplexity
from workbench.runs.distribution import ENOUGH_FOR_P99
from workbench.runs.metrics import SLO
from workbench.runs.report import finite
from workbench.runs.run import Run
from workbench.runs.session import Session
from workbench.runs.workload import Workload

WEIGHTS = ("bf16", "int8", "int4")
BATCHING = ("static", "continuous")
WORKLOAD = Workload(
    name="demo", rate=24.0, num_requests=48, shared_len=32, input_len=(16, 64), output_len=(8, 64), seed=0
)
CONFIG = EngineConfig(max_batch_size=16, memory_limit=128 * 10**6)
PERPLEXITY_TOKENS = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a run failed, 130 after an interrupt; what was measured until then is still shown."""
    parser = argparse.ArgumentParser(prog="python -m workbench.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every figure, the versions and the machine to FILE"
    )
    parser.add_argument("--model", default=CONFIG.model, help="'bundled' (default), a folder, a hub id")
    parser.add_argument("--requests", type=int, default=WORKLOAD.num_requests, help="requests per run")
    parser.add_argument("--rate", type=float, default=WORKLOAD.rate, help="requests per second (inf: all at once)")
    parser.add_argument("--seed", type=int, default=WORKLOAD.seed, help="of the workload")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    try:
        workload = replace(WORKLOAD, num_requests=options.requests, rate=options.rate, seed=options.seed)
        limit = CONFIG.memory_limit if options.model == CONFIG.model else None
        config = replace(CONFIG, model=options.model, memory_limit=limit)
    except ValueError as error:
        parser.error(str(error))
    interrupted = False
    with Session(quality_tokens=PERPLEXITY_TOKENS) as session:
        try:
            measure(session, config, workload, progress=not options.quiet)
        except KeyboardInterrupt:
            interrupted = True
        if (refusal := refused(session.runs)) is not None:
            parser.error(refusal)
        print(report(session.runs))
        if options.json:
            write_json(options.json, session.runs, [] if argv is None else argv)
    return 130 if interrupted else int(any(run.status == "failed" for run in session.runs))


def refused(runs: Sequence[Run]) -> str | None:
    """Why no run got as far as an engine, where the reason is one for all: six rows would say nothing else."""
    reasons = {run.error for run in runs}
    return reasons.pop() if len(reasons) == 1 and not any(run.snapshot().description for run in runs) else None


def measure(session: Session, config: EngineConfig, workload: Workload, *, progress: bool = True) -> None:
    """Every weight format under every policy, one after another; perplexity once per weight format."""
    pairs = [(weights, batching) for weights in WEIGHTS for batching in BATCHING]
    with tqdm(total=len(pairs), disable=not progress, desc="runs", unit="run", file=sys.stderr) as bar:
        for weights, batching in pairs:
            bar.set_postfix_str(f"{weights} weights, {batching} batching")
            chosen = replace(config, weights=weights, batching=batching)
            session.run(chosen, workload, SLO(), label=f"{weights}, {batching}", quality=True, progress=progress)
            bar.update()


def report(runs: Sequence[Run]) -> str:
    """The table, what limited each run, and how it was obtained."""
    if not runs:
        return "nothing was run"
    first = runs[0].snapshot()
    lines = [
        f"{first.config.model}: {first.workload.num_requests} requests, {first.workload.arrivals_text}, "
        f"seed {first.workload.seed}; max batch {first.config.max_batch_size}; {first.description or 'no engine'}",
        "",
        text.table([cells(run) for run in runs]),
        "",
        "TTFT counts from the scheduled arrival. A p99 of fewer than "
        f"{ENOUGH_FOR_P99} requests is little more than their maximum.",
        "Perplexity: held-out Python, measured once per weight format.",
        "What limited each run:",
        *(f"  {run.label}: {run.snapshot().sentence or run.status}" for run in runs),
    ]
    qualities = {str(run.config.weights): run.perplexity for run in runs if run.perplexity is not None}
    return "\n".join([*lines, *_against_bf16(qualities)])


def cells(run: Run) -> dict[str, str]:
    """One row of the table as text; a dash where nothing was measured."""
    m, plan, quality = run.metrics, run.memory, run.perplexity
    ttft, tpot, latency = (m.ttft, m.tpot, m.latency) if m else (None, None, None)
    return {
        "weights": str(run.config.weights),
        "batching": run.config.batching,
        "weights mem": text.size(plan.weights_total if plan else None),
        "KV pool": text.size(plan.kv if plan else None),
        "tokens fit": text.number(plan.tokens_that_fit if plan else None),
        "TTFT p50": text.seconds(ttft.p50 if ttft else None),
        "TTFT p99": text.seconds(ttft.p99 if ttft else None),
        "TPOT p50": text.seconds(tpot.p50 if tpot else None),
        "latency p99": text.seconds(latency.p99 if latency else None),
        "tokens/s": text.number(m.tokens_per_s if m else None),
        "perplexity": f"{quality.value:.3f}" if quality else text.ABSENT,
    }


def _against_bf16(qualities: Mapping[str, Perplexity]) -> list[str]:
    base = qualities.get("bf16")
    lines = []
    for weights, quality in qualities.items():
        if base is None or quality is base:
            continue
        ratio, margin = quality.ratio(base)
        spread = "" if margin is None else f" (95 %: +-{100 * margin:.2f})"
        lines.append(
            f"Perplexity {weights} against bf16: {100 * (ratio - 1):+.2f} %{spread} over {quality.tokens:,} tokens"
        )
    return lines


def write_json(path: str, runs: Sequence[Run], argv: Sequence[str]) -> None:
    """Figures of all runs with everything needed to repeat them."""
    from engine.machine import write_report

    record: dict[str, Any] = {
        "workload": {name: finite(value) for name, value in asdict(runs[0].workload).items()} if runs else None,
        "engine": runs[0].description if runs else None,
        "runs": [
            {name: finite(value) for name, value in run.row().items()} | {"sentence": run.snapshot().sentence}
            for run in runs
        ],
    }
    write_report(path, record, argv or None)


if __name__ == "__main__":
    sys.exit(main())

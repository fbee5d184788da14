"""Up to which batch size fewer bits decode faster, on this machine: `python -m workbench.crossover`.

A decode step at batch 1 reads every weight for one token, so its time follows the bytes. At large batches the step is
bound by arithmetic, and what remains of int4 is the work of unpacking it. Where the two meet depends on machine,
matrices and kernels, so it is measured: whole decode steps of the engine, the formats in turns.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.loader import load_model
from engine.running.device import resolve_device
from engine.sampling_params import SamplingParams
from kernels import WEIGHT_FORMATS
from workbench import text as words

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

FORMATS = ("bf16", "int8", "int4")
BATCHES_GPU = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES_CPU = (1, 4, 16, 64)
PROMPT, SPARE = 1, 2
"""Tokens of each prompt, so short that it is the weights that are read, and of the answers beside those that are timed:
the first one, and one so that none ends."""

ENOUGH = 0.5
"""Seconds after which no further step is timed, once there are two."""
POOL_RATIO = 0.25
"""Of the memory that is left, for each engine's KV pool: the engines of all formats are open at once."""


@dataclass(frozen=True, slots=True)
class Crossover:
    """Seconds of one decode step by format and batch size, one figure per round; rounds of all formats alternate."""

    model: str
    description: str
    seconds: dict[str, dict[int, tuple[float, ...]]]
    skipped: tuple[int, ...] = ()
    interrupted: bool = False

    @property
    def batches(self) -> list[int]:
        """Sizes measured in every format."""
        found = [set(times) for times in self.seconds.values()]
        return sorted(set.intersection(*found)) if found else []

    def speedup(self, format: str, over: str, batch: int) -> tuple[float, float, float]:
        """How many times as fast as `over`: median within rounds, lowest, highest."""
        pairs = zip(self.seconds[over][batch], self.seconds[format][batch], strict=False)
        ratios = [slow / fast for slow, fast in pairs]
        return median(ratios), min(ratios), max(ratios)

    def last_win(self, format: str, over: str) -> int | None:
        """The largest batch size up to which `format` is faster than `over` in every round at every size measured."""
        won = None
        for batch in self.batches:
            if self.speedup(format, over, batch)[1] <= 1.0:
                break
            won = batch
        return won

    def sentence(self, format: str, over: str) -> str:
        """What the figures say of two formats, in words."""
        batches, won = self.batches, self.last_win(format, over)
        if not batches:
            return f"{format} against {over}: nothing was measured"
        ratio, low, high = self.speedup(format, over, batches[0])
        first = f"{ratio:.2f}x at batch {batches[0]}"
        later = [batch for batch in batches if batch > (won or 0) and self.speedup(format, over, batch)[1] > 1.0]
        sizes = f"at batch {', '.join(map(str, later))}"
        if won is None:
            later_too = f"; in every round it is {sizes}" if later else ""
            if ratio > 1.0:  # the rounds disagree
                first = f"{low:.2f}x to {high:.2f}x at batch {batches[0]}"
                return f"{format} is not faster than {over} in every round ({first}){later_too}"
            even = "" if later else "even "
            return f"{format} is not faster than {over} {even}at batch {batches[0]} ({first}){later_too}"
        if won == batches[-1]:
            last = f", {self.speedup(format, over, won)[0]:.2f}x at {won}" if len(batches) > 1 else ""
            return f"{format} is faster than {over} at every batch size measured: {first}{last}"
        following = batches[batches.index(won) + 1]
        ratio, low, high = self.speedup(format, over, following)
        until = f"{format} is faster than {over} up to batch {won} ({first}), and"
        again = f"; in every round it is again {sizes}" if later else ""
        if ratio > 1.0:
            return f"{until} at {following} not in every round ({low:.2f}x to {high:.2f}x){again}"
        return f"{until} no longer at {following} ({ratio:.2f}x){again}"

    def sentences(self) -> list[str]:
        names = list(self.seconds)
        found = [self.sentence(name, names[0]) for name in names[1:]]
        return found + ([self.sentence("int4", "int8")] if {"int8", "int4"} <= set(names) else [])

    @property
    def rounds(self) -> str:
        """How many there are; after an interrupt not as many of every size."""
        counts = {len(rounds) for times in self.seconds.values() for rounds in times.values()} or {0}
        found = words.count(max(counts), "round")
        return (found if len(counts) == 1 else f"{min(counts)} to {found}") + (", interrupted" * self.interrupted)

    def frame(self) -> pandas.DataFrame:
        """Median seconds of a step: batch sizes down, formats across."""
        import pandas

        medians = {name: {b: median(t) for b, t in times.items()} for name, times in self.seconds.items()}
        return pandas.DataFrame(medians).rename_axis("batch").sort_index()

    def figure(self) -> go.Figure:
        """Speed against the first format by batch size; 1 is where a format stops helping."""
        first, *others = self.seconds
        from workbench import figure as figures  # plotly, which measuring alone does not need

        drawn = figures.blank(
            f"Decode steps of {self.model} against {first}",
            "requests in the batch",
            f"times as fast as {first}",
            xaxis_type="log",
            xaxis_tickvals=self.batches,
            xaxis_ticktext=[str(batch) for batch in self.batches],
            yaxis_rangemode="tozero",
        )
        for name in others:
            ratios = [self.speedup(name, first, batch) for batch in self.batches]
            figures.line(
                drawn,
                name,
                self.batches,
                [middle for middle, _, _ in ratios],
                f"{name}: %{{y:.2f}} times as fast at batch %{{x}}",
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - middle for middle, _, high in ratios],
                    "arrayminus": [middle - low for middle, low, _ in ratios],
                },
            )
        drawn.add_hline(y=1.0, line_dash="dash")
        return drawn

    def __str__(self) -> str:
        first, *others = self.seconds
        rows = []
        for batch in self.batches:
            row = {"batch": str(batch), "": ""}
            row |= {name: words.seconds(median(self.seconds[name][batch])) for name in self.seconds}
            rows.append(row | {f"{name}/{first}": f"{self.speedup(name, first, batch)[0]:.2f}x" for name in others})
        return words.table(rows) if rows else "nothing was measured"


def measure(
    config: EngineConfig | None = None,
    formats: Sequence[str] = FORMATS,
    batches: Sequence[int] | None = None,
    *,
    rounds: int = 3,
    steps: int = 8,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> Crossover:
    """Time up to `steps` decode steps of every format at every batch size, `rounds` times over, the formats in turns.

    config: the engine, whatever its weights; synthetic models are fine, for this is about speed. batches: 1 to 256 on
    a GPU and to 64 on a CPU by default; sizes that do not fit the KV pool of some format are in `skipped`. An
    interrupt, or `stopped`, ends it with the rounds that are whole. ConfigError where nothing is computed or a format
    is unknown.
    """
    config = config or EngineConfig()
    if config.runner != "torch":
        raise ConfigError(f"runner is {config.runner!r}; only the runner 'torch' computes, and can be timed")
    if len(formats) < 2 or rounds < 1 or steps < 1:
        raise ConfigError(f"{len(formats)} formats, {rounds} rounds, {steps} steps; at least 2, 1 and 1 are needed")
    config = replace(config, cache_ratio=min(config.cache_ratio, POOL_RATIO), prefix_caching=False)
    on_gpu = resolve_device(config.device).type == "cuda"
    sizes = sorted(set(batches or (BATCHES_GPU if on_gpu else BATCHES_CPU)))
    most = max(config.max_batch_size, sizes[-1])
    with ExitStack() as stack:
        model = stack.enter_context(load_model(config))
        engines: dict[str, Engine] = {}
        for name in tqdm(formats, desc="building", unit="format", disable=not progress, leave=False):
            tokens = max(config.max_batched_tokens, most * PROMPT)  # a batch's prompts are computed in one step
            chosen = replace(config, weights=name, max_batch_size=most, max_batched_tokens=tokens)
            engines[name] = stack.enter_context(Engine(chosen, model=model))
        first = next(iter(engines.values()))
        room = min(engine.memory.tokens_that_fit for engine in engines.values())
        per_request = -(-(PROMPT + steps + SPARE) // first.block_size) * first.block_size
        fitting = [batch for batch in sizes if batch * per_request <= room]
        if not fitting:
            raise ConfigError(f"the KV pool holds {room:,} tokens; batch {sizes[0]} needs {sizes[0] * per_request:,}")
        seconds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in fitting} for name in engines}
        interrupted = _rounds(engines, seconds, fitting, rounds, steps, progress, stopped)
        whole = {n: {b: tuple(t) for b, t in times.items() if t} for n, times in seconds.items()}
        skipped = tuple(batch for batch in sizes if batch not in fitting)
        return Crossover(config.model, first.description.split(";")[0], whole, skipped, interrupted)


def _rounds(
    engines: dict[str, Engine],
    seconds: dict[str, dict[int, list[float]]],
    batches: Sequence[int],
    rounds: int,
    steps: int,
    progress: bool,
    stopped: Callable[[], bool],
) -> bool:
    """Fill `seconds`; True where an interrupt ended it. Round 0 warms up: first steps allocate, compile and capture."""
    total = (rounds + 1) * len(batches) * len(engines)
    with tqdm(total=total, desc="decode steps", unit="run", disable=not progress) as bar:
        for turn in range(rounds + 1):
            for batch in batches:
                measured = {}
                try:
                    for name, engine in engines.items():
                        if stopped():
                            return True
                        bar.set_postfix_str(f"batch {batch}, {name}")
                        measured[name] = step_seconds(engine, batch, steps if turn else 1)
                        bar.update()
                except KeyboardInterrupt:
                    return True
                if turn:
                    for name, value in measured.items():
                        seconds[name][batch].append(value)
    return False


def step_seconds(engine: Engine, batch: int, steps: int) -> float:
    """Mean seconds of a decode step with `batch` requests of PROMPT tokens, after their prompts are computed."""
    rng = random.Random(batch)
    params = SamplingParams(max_tokens=steps + SPARE, ignore_eos=True)
    names = [
        engine.add_request([rng.randrange(engine.spec.vocab_size) for _ in range(PROMPT)], params) for _ in range(batch)
    ]
    try:
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {output.request_id for output in engine.step()}
        start, taken, passed = time.perf_counter(), 0, 0.0
        while taken < steps and (taken < 2 or passed < ENOUGH):
            engine.step()
            taken, passed = taken + 1, time.perf_counter() - start
        return passed / taken
    finally:
        for name in names:
            engine.abort(name)
        while engine.has_unfinished():
            engine.step()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m workbench.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), 'synthetic:<shape>', folder, hub id")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=WEIGHT_FORMATS, help="the first is 1x")
    parser.add_argument("--batches", nargs="+", type=int, help="sizes (default: 1 to 256 on a GPU, to 64 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3, help="repeats, the formats in turns")
    parser.add_argument("--steps", type=int, default=8, help="most decode steps that are timed together")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every figure, the versions and the machine to FILE"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    if options.batches and min(options.batches) < 1:
        parser.error(f"--batches has {min(options.batches)}; a batch holds at least 1 request")
    try:
        config = EngineConfig(model=options.model, device=options.device)
        found = measure(
            config,
            options.formats,
            options.batches,
            rounds=options.rounds,
            steps=options.steps,
            progress=not options.quiet,
        )
    except (ConfigError, CheckpointError) as error:
        parser.error(str(error))
    print(f"{found.model}, {found.description}: one decode step, median of {found.rounds}\n\n{found}\n")
    print("\n".join(found.sentences()))
    if found.skipped:
        print(f"left out, for the KV pool does not hold them: batch {', '.join(map(str, found.skipped))}")
    if options.json:
        from engine.machine import write_report

        record: dict[str, Any] = {
            "model": found.model,
            "engine": found.description,
            "seed": config.seed,
            "steps": options.steps,
            "seconds": found.seconds,
            "sentences": found.sentences(),
            "skipped": found.skipped,
            "interrupted": found.interrupted,
        }
        write_report(options.json, record, argv)
    return 130 if found.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())

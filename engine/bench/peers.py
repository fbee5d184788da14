"""The workloads that other engines were measured with (see `PeerSizes`), one number each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.bench.measure import StepTimes, serve
from engine.bench.roofline import Roofline, card, measured_bandwidth
from engine.bench.work import Work, fixed_work, shared_work, uniform_work
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel

PARTS = ("tpot", "ttft", "offline", "shared")


@dataclass(frozen=True)
class PeerSizes:
    """tpot: for each of `batches`, that many prompts of `prompt` tokens; (time for `output` tokens - time for 1) over
    the steps between. ttft: one such prompt, one token. shared: `shared` requests of a common prefix, own tokens, and
    output tokens, prefix caching on. offline: requests of nano-vllm's benchmark, lengths uniform in [low, high]. rest:
    seconds without work before each timed run of tpot and ttft: a GPU at its power limit lowers its clocks, and the run
    after it would pay, which for the two runs whose difference is tpot are not the same ones."""

    prompt: int = 512
    output: int = 129
    batches: Sequence[int] = (1, 8, 64)
    shared: tuple[int, int, int, int] = (128, 1024, 64, 64)
    offline: tuple[int, int, int] = (256, 100, 1024)
    rest: float = 0.3

    def divided(self, by: int) -> PeerSizes:
        """The same shapes, every count and length an n-th: for a machine that is not a GPU."""

        def cut(value: int) -> int:
            return max(1, value // by)

        return PeerSizes(
            prompt=cut(self.prompt),
            output=max(2, self.output // by),
            batches=sorted({cut(batch) for batch in self.batches}),
            shared=tuple(map(cut, self.shared)),  # type: ignore[arg-type]
            offline=tuple(map(cut, self.offline)),  # type: ignore[arg-type]
            rest=0.0,
        )


def run_peers(
    config: EngineConfig, model: LoadedModel, sizes: PeerSizes, parts: Sequence[str], repeats: int, seed: int
) -> dict[str, Any]:
    """One configuration; prints each number as it is known. Two engines in turn: without and with prefix caching."""
    report: dict[str, Any] = {"config": asdict(config), "sizes": asdict(sizes), "repeats": repeats}
    vocab = model.spec.vocab_size
    if set(parts) - {"shared"}:
        bandwidth = measured_bandwidth(config.device)  # before the engine is, whose workspace is then its own alone
        with Engine(replace(config, prefix_caching=False), model=model) as engine:
            if "offline" in parts:  # the others warm up with their own shapes
                engine.warm_up(2 * sizes.offline[2])
            elif "ttft" in parts:
                engine.warm_up(sizes.prompt)
            roofline = Roofline.of(engine, bandwidth)
            print(card(engine, roofline), flush=True)
            report |= {"description": engine.description, "roofline": roofline.as_dict()}
            if "ttft" in parts:
                report["ttft"] = _ttft(engine, fixed_work(vocab, 1, sizes.prompt, 1, seed), repeats, sizes.rest)
            if "tpot" in parts:
                report["tpot"] = [_tpot(engine, roofline, sizes, batch, repeats, seed) for batch in sizes.batches]
            if "offline" in parts:
                report["offline"] = _offline(engine, uniform_work(vocab, *sizes.offline, seed))
            report["measured_memory"] = engine.measured_memory()
    if "shared" in parts:
        with Engine(replace(config, prefix_caching=True), model=model) as engine:
            report.setdefault("description", engine.description)
            works = [shared_work(vocab, *sizes.shared, seed + number) for number in range(repeats + 1)]
            report["shared"] = _shared(engine, works)
    return report


def _seconds(engine: Engine, work: Work, rest: float = 0.0) -> float:
    time.sleep(rest)
    return serve(engine, work)[0]


def _watched(engine: Engine, work: Work, rest: float = 0.0) -> tuple[float, StepTimes]:
    times = StepTimes()
    engine.observers.append(times)
    try:
        return _seconds(engine, work, rest), times
    finally:
        engine.observers.remove(times)


def _tpot(
    engine: Engine, roofline: Roofline, sizes: PeerSizes, batch: int, repeats: int, seed: int
) -> dict[str, Any]:
    long = fixed_work(engine.spec.vocab_size, batch, sizes.prompt, sizes.output, seed)
    short = Work(long.prompts, [1] * batch)
    steps = sizes.output - 1
    for work in (short, long):
        _seconds(engine, work)  # warm-up: kernels are compiled, graphs captured
    runs, decode = [], {}
    for _ in range(repeats):
        first = _seconds(engine, short, sizes.rest)
        whole, times = _watched(engine, long, sizes.rest)
        runs.append((whole - first) / steps * 1e3)
        decode = times.decode()
    median = statistics.median(runs)
    floor = roofline.floor(batch, sizes.prompt + sizes.output / 2) * 1e3
    print(
        f"  tpot_bs{batch}: {median:.3f} ms ({min(runs):.3f} .. {max(runs):.3f}), {floor / median:.0%} of the floor's "
        f"speed ({floor:.3f} ms); a decode step {_ms(decode['step_ms'])}: device {_ms(decode['device_ms'])}, "
        f"host {_ms(decode['host_ms'])}, {decode['overlapped']} of {decode['steps']} prepared beside another",
        flush=True,
    )
    return {"batch": batch, "tpot_ms": median, "runs_ms": runs, "floor_ms": floor, "share": floor / median, **decode}


def _ttft(engine: Engine, work: Work, repeats: int, rest: float) -> dict[str, Any]:
    _seconds(engine, work)
    runs = [_seconds(engine, work, rest) * 1e3 for _ in range(max(repeats, 3))]
    median = statistics.median(runs)
    length = len(work.prompts[0])
    print(f"  ttft{length}_bs1: {median:.2f} ms ({min(runs):.2f} .. {max(runs):.2f})", flush=True)
    return {"prompt": length, "ttft_ms": median, "runs_ms": runs}


def _offline(engine: Engine, work: Work) -> dict[str, Any]:
    """One run, after the same work cut to a few tokens has warmed up what it needs."""
    _seconds(engine, Work(work.prompts, [min(count, 8) for count in work.num_outputs]))
    seconds, times = _watched(engine, work)
    rate = work.output_tokens / seconds
    total, decode = times.total(), times.decode()
    print(
        f"  offline: {rate:,.0f} output tokens/s ({work.output_tokens:,} in {seconds:.2f} s, {total['steps']} steps, "
        f"{total['mixed_steps']} of them mixed, {total['preempted']} preemptions; host {total['host_s']:.2f} s)",
        flush=True,
    )
    return {
        "tokens_per_s": rate, "seconds": seconds, "output_tokens": work.output_tokens, "steps": total, "decode": decode
    }  # fmt: skip


def _shared(engine: Engine, works: Sequence[Work]) -> dict[str, Any]:
    """The first work warms up; each has tokens of its own, so that none finds the one before in the cache."""
    runs, hits = [], 0
    for number, work in enumerate(works):
        engine.reset_prefix_cache()
        seconds, times = _watched(engine, work)
        hits = times.total()["hit_tokens"]
        if number:
            runs.append(seconds)
    median = statistics.median(runs)
    print(f"  shared: {median:.3f} s ({min(runs):.3f} .. {max(runs):.3f}), {hits:,} prompt tokens found", flush=True)
    return {"seconds": median, "runs": runs, "hit_tokens": hits}


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} ms"

"""A long run: mixed traffic with random aborts. Nothing may be lost, memory stays flat, every list agrees.

On a CPU torch keeps up to 1,024 compiled oneDNN operations of each kind, by shape, so memory rises for minutes until
those are met; with ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 and LRU_CACHE_CAPACITY=32 in the environment it does not.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import psutil
import torch

from engine.engine import Engine
from engine.request import RequestOutput
from engine.sampling_params import SamplingParams

IN_FLIGHT = 3  # times the batch size
CHECK_EVERY = 200  # steps
ABORT = 0.02  # chance per step
WARM_UP = 0.1  # share of the time after which memory must be flat


class Soak:
    """Sends, aborts, counts. What a request answers is held against what it was promised: its length, its end."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.longest = min(engine.session_len - 1, 600)
        self.sent: dict[str, tuple[list[int], SamplingParams]] = {}
        self.told: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.tokens = self.steps = self.aborts = 0
        self.stopped = False
        self.memory: list[dict[str, float]] = []

    def run(self, seconds: float, progress: Any = None) -> dict[str, Any]:
        """Raises AssertionError where something is lost or told twice, or a list disagrees with another."""
        begun = time.perf_counter()
        self._sample(0.0)
        while (elapsed := time.perf_counter() - begun) < seconds and not self.stopped:
            self._send()
            if self.rng.random() < ABORT and self.sent:
                self.aborts += self.engine.abort(self.rng.choice(list(self.sent)))
            self._step()
            if self.steps % CHECK_EVERY == 0:
                self.engine.check_integrity()
                self._sample(elapsed)
                if progress is not None:
                    progress(elapsed)
        while self.engine.has_unfinished():
            self._step()
        self.engine.check_integrity()
        self._sample(time.perf_counter() - begun)
        assert not self.sent, f"{len(self.sent)} requests were never answered"
        assert self.engine.scheduler.cache.pool.num_used == 0, "blocks are held by nobody"
        return self._report(time.perf_counter() - begun)

    def stop(self, *_: object) -> None:
        """End the traffic after the step under way; a signal handler."""
        self.stopped = True

    def _send(self) -> None:
        rng = self.rng
        while len(self.sent) < IN_FLIGHT * self.engine.config.max_batch_size and rng.random() < 0.7:
            family = rng.randrange(20)  # prompts of a family begin alike
            length = rng.randint(1, self.longest)
            vocab = self.engine.spec.vocab_size
            prompt = [(family * 31 + j) % vocab for j in range(length)]
            params = SamplingParams(
                max_tokens=rng.randint(1, 200),
                temperature=rng.choice([0.0, 0.0, 0.8]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0] * 19 + [1.1]),
                logprobs=rng.choice([None] * 19 + [2]),
                seed=rng.randrange(1000),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=(rng.randrange(vocab),),
            )
            self.sent[self.engine.add_request(prompt, params)] = prompt, params

    def _step(self) -> None:
        wakeup = self.engine.next_wakeup()
        if wakeup is not None:
            self.engine.clock.wait_until(wakeup)
        for output in self.engine.step():
            self.told[output.request_id] += len(output.new_token_ids)
            if output.finished:
                self._ended(output)
        self.steps += 1

    def _ended(self, output: RequestOutput) -> None:
        prompt, params = self.sent.pop(output.request_id)
        reason, count = output.finish_reason, len(output.token_ids)
        assert self.told.pop(output.request_id) == count, f"{output.request_id}: tokens were lost on the way"
        assert reason in ("stop", "length", "abort"), f"{output.request_id} ended as {reason}: {output.error}"
        if reason == "length":
            assert count == min(params.max_tokens, self.engine.session_len - len(prompt)), f"{count} tokens"
        elif reason == "stop":
            ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.engine.spec.eos_token_ids)}
            assert output.token_ids[-1] in ends
        if params.logprobs is not None and self.engine.config.runner == "torch":
            assert len(output.logprobs) == count
        self.ends[reason] += 1
        self.tokens += count

    def _sample(self, elapsed: float) -> None:
        memory = {"elapsed_s": elapsed, "host_bytes": float(psutil.Process().memory_info().rss)}
        if torch.cuda.is_available():
            memory["device_bytes"] = float(torch.cuda.memory_reserved())
        self.memory.append(memory)

    def _report(self, seconds: float) -> dict[str, Any]:
        settled = [m for m in self.memory if m["elapsed_s"] >= WARM_UP * seconds] or self.memory[-1:]
        growth = {name: settled[-1][name] - settled[0][name] for name in settled[0] if name.endswith("_bytes")}
        return {
            "config": asdict(self.engine.config),
            "description": self.engine.description,
            "seconds": seconds,
            "steps": self.steps,
            "requests": sum(self.ends.values()),
            "ends": dict(self.ends),
            "aborts_asked": self.aborts,
            "output_tokens": self.tokens,
            "growth_after_warm_up": growth,
            "memory": self.memory[:: max(1, len(self.memory) // 200)],
            "integrity_checks": self.steps // CHECK_EVERY + 1,
        }


def run_soak(engine: Engine, minutes: float, seed: int) -> dict[str, Any]:
    from tqdm.auto import tqdm

    soak = Soak(engine, seed)
    before = signal.signal(signal.SIGINT, soak.stop)  # what was sent is answered and counted first
    try:
        with tqdm(total=round(minutes * 60), desc="soak", unit="s") as bar:
            report = soak.run(minutes * 60, lambda elapsed: bar.update(int(elapsed) - bar.n))
    finally:
        signal.signal(signal.SIGINT, before)
    grown = report["growth_after_warm_up"]
    growth = ", ".join(f"{name.removesuffix('_bytes')} {more / 1e6:+,.1f} MB" for name, more in grown.items())
    print(
        f"  {report['requests']:,} requests ended ({report['ends']}), {report['output_tokens']:,} tokens in "
        f"{report['steps']:,} steps; nothing lost, {report['integrity_checks']:,} integrity checks clean; memory after "
        f"the first tenth: {growth}",
        flush=True,
    )
    return report

"""Measure the engine: `python -m engine.bench --model bundled --suite mixed --compare transformers`.

Prints the roofline card first (bytes a step must read), then one line per configuration; candidates are interleaved
and repeated; figures are medians with their range. `--json FILE` writes everything with machine, versions and command.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedModel, load_model
from engine.machine import describe_machine
from engine.request import RequestOutput
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Work:
    """Prompts and the number of output tokens of each; end-of-text is ignored so that lengths are exact."""

    prompts: list[list[int]]
    num_outputs: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(self.num_outputs)

    @property
    def params(self) -> list[SamplingParams]:
        return [SamplingParams(max_tokens=n, ignore_eos=True) for n in self.num_outputs]


def uniform_work(vocab_size: int, count: int, low: int, high: int, seed: int) -> Work:
    """`count` requests of random tokens, lengths in and out uniform in [low, high]."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(low, high))] for _ in range(count)]
    return Work(prompts, [rng.randint(low, high) for _ in range(count)])


def decode_work(vocab_size: int, count: int, seed: int) -> Work:
    """`count` prompts of 512 random tokens, 129 output tokens each: the last 128 of them are pure decode steps."""
    rng = random.Random(seed)
    return Work([[rng.randrange(vocab_size) for _ in range(512)] for _ in range(count)], [129] * count)


SUITES: dict[str, Callable[[int, int], Work]] = {
    "single": lambda vocab, seed: uniform_work(vocab, 1, 64, 64, seed),
    "mixed": lambda vocab, seed: uniform_work(vocab, 64, 16, 128, seed),
    "decode1": lambda vocab, seed: decode_work(vocab, 1, seed),
    "decode8": lambda vocab, seed: decode_work(vocab, 8, seed),
    "decode64": lambda vocab, seed: decode_work(vocab, 64, seed),
}
SUITE_HELP = (
    "single: one request, 64 tokens in and out; mixed: 64 requests, lengths in and out uniform in [16, 128]; "
    "decodeN: N prompts of 512 tokens, 129 tokens out"
)


@dataclass
class Measured:
    """One candidate's repeats. Seconds; `tpot` is the mean over requests of each repeat."""

    name: str
    seconds: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    output_tokens: int = 0

    @property
    def tokens_per_second(self) -> list[float]:
        return [self.output_tokens / seconds for seconds in self.seconds]

    def line(self) -> str:
        rate = self.tokens_per_second
        parts = [f"{self.name:<32} {statistics.median(rate):10,.1f} tokens/s ({min(rate):,.1f} .. {max(rate):,.1f})"]
        if self.tpot:
            parts.append(f"TPOT {statistics.median(self.tpot) * 1e3:.2f} ms")
        if self.ttft:
            parts.append(f"TTFT {statistics.median(self.ttft) * 1e3:.1f} ms")
        return "   ".join(parts)


Candidate = Callable[[Work], tuple[float, list[RequestOutput] | None]]


def engine_candidate(engine: Engine) -> Candidate:
    def run(work: Work) -> tuple[float, list[RequestOutput] | None]:
        engine.reset_prefix_cache()
        start = time.perf_counter()
        outputs = engine.generate(work.prompts, work.params)
        return time.perf_counter() - start, outputs

    return run


def measure(candidates: dict[str, Candidate], work: Work, repeats: int) -> list[Measured]:
    """Interleaved: every candidate once per round, in turn, after one warm-up round that is not counted."""
    results = {name: Measured(name, output_tokens=work.output_tokens) for name in candidates}
    with tqdm(total=(repeats + 1) * len(candidates), desc="runs", unit="run", file=sys.stderr) as bar:
        for number in range(repeats + 1):
            for name, run in candidates.items():
                seconds, outputs = run(work)
                bar.update()
                if number:
                    _record(results[name], seconds, outputs)
    return list(results.values())


def _record(result: Measured, seconds: float, outputs: list[RequestOutput] | None) -> None:
    result.seconds.append(seconds)
    timings = [output.timing for output in outputs or ()]
    for into, values in (
        (result.ttft, [timing.ttft for timing in timings if timing.ttft is not None]),
        (result.tpot, [timing.tpot for timing in timings if timing.tpot is not None]),
    ):
        if values:
            into.append(statistics.fmean(values))


def roofline_card(engine: Engine) -> str:
    config, memory, spec = engine.config, engine.memory, engine.spec
    return (
        f"{config.model}, weights {config.weights}, kv {config.kv}: {spec.num_parameters / 1e6:,.1f} M parameters, "
        f"{memory.weights_total / 1e6:,.1f} MB of weights, "
        f"{spec.kv_bytes_per_token(config.kv, config.kv_repair) / 1e3:,.2f} kB of KV "
        f"per token, {memory.tokens_that_fit:,} tokens fit\n  {engine.description}"
    )


def transformers_candidate(model: LoadedModel, folder: Path, batch_size: int = 16) -> Candidate:
    """transformers' own `generate`, greedy, in left-padded batches that each run to their longest output; bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    pad = model.spec.eos_token_ids[0] if model.spec.eos_token_ids else 0

    def run(work: Work) -> tuple[float, None]:
        start = time.perf_counter()
        for first in range(0, len(work.prompts), batch_size):
            prompts = work.prompts[first : first + batch_size]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            new = max(work.num_outputs[first : first + batch_size])
            with torch.inference_mode():
                network.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=pad,
                )
        return time.perf_counter() - start, None

    return run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--weights", nargs="+", default=["bf16"], help="one or more weight formats, measured in turn")
    parser.add_argument("--kv", nargs="+", default=["bf16"], help="one or more KV formats, measured in turn")
    parser.add_argument("--suite", nargs="+", default=["single"], choices=list(SUITES), help=SUITE_HELP)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--max-batched-tokens", type=int, default=EngineConfig.max_batched_tokens)
    parser.add_argument(
        "--memory-limit", type=float, metavar="GB", help="of each engine; needed to hold several on a GPU"
    )
    parser.add_argument("--compare", choices=["transformers"], help="its generate, padded batches of 16")
    parser.add_argument("--json", type=Path, help="write every repeat with machine, versions, seed and command")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    report: dict[str, Any] = {"machine": describe_machine(argv), "model": args.model, "seed": args.seed, "suites": {}}
    common: dict[str, Any] = {
        "model": args.model,
        "seed": args.seed,
        "max_batch_size": args.max_batch_size,
        "max_batched_tokens": args.max_batched_tokens,
        "memory_limit": int(args.memory_limit * 1e9) if args.memory_limit else None,
    }
    with load_model(EngineConfig(**common)) as model:
        engines = {
            f"weights {weights}, kv {kv}": Engine(EngineConfig(weights=weights, kv=kv, **common), model=model)
            for weights in args.weights
            for kv in args.kv
        }
        try:
            for engine in engines.values():
                print(roofline_card(engine))
            candidates = {name: engine_candidate(engine) for name, engine in engines.items()}
            if args.compare:
                candidates["transformers generate, bf16"] = transformers_candidate(model, model_folder(args.model))
            for suite in args.suite:
                results = measure(candidates, SUITES[suite](model.spec.vocab_size, args.seed), args.repeats)
                print_suite(suite, results)
                report["suites"][suite] = [asdict(result) for result in results]
        finally:
            for engine in engines.values():
                engine.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def model_folder(model: str) -> Path:
    if model == "bundled":
        from engine.bundled import MODEL_DIR

        return MODEL_DIR
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise SystemExit(f"--compare needs a model on disk; --model is {model!r}, give 'bundled' or a local folder")
    return folder


def paired_ratio(first: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast `other` is: the median of first / other over rounds."""
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def print_suite(suite: str, results: list[Measured]) -> None:
    """Ratios say how many times as fast as the first candidate; decode is the ratio of TPOT.

    Each is the median over rounds of the ratio within a round, so that a machine that slows down meets both alike.
    """
    print(f"{suite}:")
    first = results[0]
    for result in results:
        ratios = [f"{paired_ratio(first.seconds, result.seconds):.2f}x the first"]
        if result.tpot and first.tpot:
            ratios.append(f"decode {paired_ratio(first.tpot, result.tpot):.2f}x")
        print(f"  {result.line()}   {', '.join(ratios)}")


if __name__ == "__main__":
    main()

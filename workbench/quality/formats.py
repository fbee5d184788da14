"""What each weight and KV format costs in quality, as a table, a figure and a record.

Every format goes through the engine's own path over the same text and the same prompts, next to bf16 weights and KV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from engine.config import GROUP_SIZES, EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.loader import load_model
from engine.model.weight_plan import WeightPlan
from kernels import KV_FORMATS, WEIGHT_FORMATS
from workbench import text as words
from workbench.quality.agreement import Agreement, greedy_answers, prompts_from
from workbench.quality.divergence import Baseline, Divergence, Estimate
from workbench.quality.perplexity import Perplexity, small_pool

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

BASELINE = "bf16"
FOUR_BITS = "int4 weights, group 128"
BARS = {
    "int8 weights": (BASELINE, 0.5),
    "w8a8 weights": (BASELINE, 1.5),
    "w4a8 weights, group 128": (FOUR_BITS, 1.5),
    "KV int8": (BASELINE, 0.2),
}
"""Most per cent of perplexity that a format may lose, and against which: 8-bit activations may cost as much over 4-bit
weights as over 8-bit ones."""


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """One configuration. divergence, agreement: None for the baseline itself, or where `error` says why."""

    name: str
    config: EngineConfig
    weight_bytes: int
    kv_bytes_per_token: int
    perplexity: Perplexity | None
    divergence: Divergence | None = None
    agreement: Agreement | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Formats side by side; the first row is the baseline. An interrupted comparison holds what was measured."""

    rows: tuple[FormatQuality, ...]
    window: int
    interrupted: bool = False

    @property
    def baseline(self) -> FormatQuality:
        return self.rows[0]

    def delta(self, row: FormatQuality) -> tuple[float, float | None] | None:
        """Loss of perplexity against the baseline in per cent, and the half width of its 95 % interval."""
        if row.perplexity is None or self.baseline.perplexity is None or row is self.baseline:
            return None
        ratio, margin = row.perplexity.ratio(self.baseline.perplexity)
        return 100 * (ratio - 1), None if margin is None else 100 * margin

    def bars(self) -> dict[str, dict[str, Any]]:
        """What was asked of a format, what was measured, and whether the bar is met; only of formats that were run."""
        measured = {row.name: row.perplexity for row in self.rows if row.perplexity is not None}
        found: dict[str, dict[str, Any]] = {}
        for name, (against, bar) in BARS.items():
            if name in measured and against in measured:
                percent = 100 * (measured[name].ratio(measured[against])[0] - 1)
                found[name] = {"against": against, "at_most_percent": bar, "percent": percent, "met": percent <= bar}
        return found

    def records(self) -> list[dict[str, Any]]:
        """Every figure by name; None = not measured."""
        return [self._record(row) for row in self.rows]

    def _record(self, row: FormatQuality) -> dict[str, Any]:
        config, delta, d, a = row.config, self.delta(row), row.divergence, row.agreement
        record: dict[str, Any] = {
            "name": row.name,
            "weights": WeightPlan.of(config.weights).as_json(),
            "group_size": config.group_size,
            "kv": str(config.kv),
            "impl": config.impl,
            "weight_bytes": row.weight_bytes,
            "kv_bytes_per_token": row.kv_bytes_per_token,
            "perplexity": row.perplexity and row.perplexity.value,
            "perplexity_percent": delta and delta[0],
            "perplexity_percent_margin": delta and delta[1],
        }
        for name in ("kl_mean", "kl_p99", "top1"):
            estimate: Estimate | None = getattr(d, name, None)
            record |= {f"{name}{end}": getattr(estimate, part, None) for end, part in _ENDS.items()}
        curves = {name: list(getattr(a, name)) if a else None for name in ("identical", "equal")}
        return record | {"half_life": a and a.half_life, **curves, "error": row.error}

    def frame(self) -> pandas.DataFrame:
        """The records as a table; the curves by length are left to `agreement_frame`."""
        import pandas

        rows = pandas.DataFrame(self.records()).set_index("name")
        return rows.drop(columns=["identical", "equal"])

    def agreement_frame(self) -> pandas.DataFrame:
        """Share of greedy answers still identical to the baseline's, by length (rows) and format (columns)."""
        import pandas

        curves = {row.name: row.agreement.identical for row in self.rows if row.agreement}
        table = pandas.DataFrame(curves)
        table.index = pandas.RangeIndex(1, len(table) + 1, name="tokens")
        return table

    def figure(self) -> go.Figure:
        """The agreement curves: how long greedy text stays that of the baseline."""
        from workbench import figure as figures  # plotly, which measuring alone does not need

        drawn = figures.blank(
            f"Greedy answers still identical to {self.baseline.name}",
            "output tokens",
            "share of answers",
            yaxis_range=[-0.02, 1.02],
            yaxis_tickformat=".0%",
        )
        for row in self.rows:
            if row.agreement is not None:
                lengths = list(range(1, len(row.agreement.identical) + 1))
                hover = f"{row.name}: %{{y:.1%}} identical through %{{x}} tokens"
                figures.line(drawn, row.name, lengths, row.agreement.identical, hover)
        return drawn

    def __str__(self) -> str:
        return words.table([self._cells(row) for row in self.rows])

    def _cells(self, row: FormatQuality) -> dict[str, str]:
        delta, d, a = self.delta(row), row.divergence, row.agreement
        loss = words.ABSENT if delta is None else f"{delta[0]:+.2f} %"
        loss += "" if delta is None or delta[1] is None else f" +-{delta[1]:.2f}"
        length = len(a.identical) if a else 0
        return {
            "format": row.name,
            "weights": words.size(row.weight_bytes),
            "KV/token": words.size(row.kv_bytes_per_token),
            "perplexity": f"{row.perplexity.value:.4f}" if row.perplexity else words.ABSENT,
            "against bf16": loss,
            "KL mean": f"{d.kl_mean.value:.5f}" if d else words.ABSENT,
            "KL p99": f"{d.kl_p99.value:.4f}" if d else words.ABSENT,
            "top-1": words.percent(d.top1.value, 1) if d else words.ABSENT,
            "identical at 32": words.percent(a.identical[31]) if a and length >= 32 else words.ABSENT,
            "at the end": f"{words.percent(a.identical[-1])} of {length}" if a else words.ABSENT,
        }


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def candidates(
    config: EngineConfig,
    weights: Sequence[str] = tuple(WEIGHT_FORMATS),
    kv: Sequence[str] = tuple(KV_FORMATS),
    checkpoints: Sequence[str] = (),
) -> dict[str, EngineConfig]:
    """Configurations by name: the baseline, the same in float32 arithmetic (what bf16 itself loses), then every weight
    format with bf16 KV, in each group size it can have, every KV format with bf16 weights, and quantized copies of the
    model as they are."""
    base = small_pool(replace(config, weights="bf16", kv="bf16"))
    found = {BASELINE: base}
    if config.impl != "torch":
        found["bf16, float32 arithmetic"] = replace(base, impl="torch")
    for name in weights:
        if name != "bf16" and not WEIGHT_FORMATS[name].grouped:
            found[f"{name} weights"] = replace(base, weights=name)
        for size in sorted(GROUP_SIZES, reverse=True) if WEIGHT_FORMATS[name].grouped else ():
            found[f"{name} weights, group {size}"] = replace(base, weights=name, group_size=size)
    found |= {f"KV {name}": replace(base, kv=name) for name in kv if name != "bf16"}
    return found | {f"checkpoint {Path(path).name}": replace(base, model=path) for path in checkpoints}


def compare(
    configs: dict[str, EngineConfig],
    text: str | None = None,
    *,
    max_tokens: int = 8192,
    window: int = 512,
    prompts: int = 32,
    answer: int = 128,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Measure each configuration against the first, on `text` (the held-out excerpt by default).

    All are forms of one model: formats of it, or checkpoints made from it.

    max_tokens, window: of text and of one window; prompts, answer: greedy answers and their length, 0 prompts for none.
    An interrupt, or `stopped`, ends it with what was measured. A configuration that cannot be built has its reason in
    `error`. ConfigError for a model whose text means nothing, or settings that fit no window.
    """
    (base_name, base_config), *others = configs.items()
    rows: list[FormatQuality] = []
    interrupted = False
    with (
        load_model(base_config) as model,
        tqdm(total=len(configs), disable=not progress, desc="formats", unit="format") as bar,
    ):
        try:
            bar.set_postfix_str(base_name)
            with Engine(base_config, model=model) as engine:
                baseline = Baseline.record(
                    engine, text, max_tokens=max_tokens, window=window, progress=progress, stopped=stopped
                )
                asked = prompts_from(engine, text, count=prompts, answer=answer) if prompts else []
                answers = greedy_answers(engine, asked, answer, stopped=stopped)
                rows.append(_row(base_name, engine, baseline.perplexity))
            bar.update()
            for name, config in others:
                bar.set_postfix_str(name)
                try:
                    with Engine(config, model=model if config.model == base_config.model else None) as engine:
                        d = baseline.compare(engine, progress=progress, stopped=stopped)
                        given = greedy_answers(engine, asked, answer, stopped=stopped)
                        agreement = Agreement.of(given, answers) if asked else None
                        rows.append(_row(name, engine, d.perplexity, d, agreement))
                except (ConfigError, CheckpointError) as error:
                    rows.append(FormatQuality(name, config, 0, 0, None, error=str(error)))
                bar.update()
        except (KeyboardInterrupt, InterruptedError):
            if not rows:
                raise
            interrupted = True
    return Comparison(tuple(rows), window, interrupted)


def _row(
    name: str,
    engine: Engine,
    perplexity: Perplexity,
    divergence: Divergence | None = None,
    agreement: Agreement | None = None,
) -> FormatQuality:
    config, spec = engine.config, engine.spec
    held = sum(spec.weight_bytes(config.weights, config.group_size).values())
    per_token = engine.memory.kv // engine.memory.tokens_that_fit
    return FormatQuality(name, config, held, per_token, perplexity, divergence, agreement)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a format that was measured misses its bar, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m workbench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), a folder, a hub id")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: bundled held-out Python)")
    parser.add_argument("--weights", nargs="*", default=list(WEIGHT_FORMATS), choices=WEIGHT_FORMATS, help="formats")
    parser.add_argument("--kv", nargs="*", default=list(KV_FORMATS), choices=KV_FORMATS, help="formats")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="DIR", help="quantized copies of the model")
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens of text")
    parser.add_argument("--window", type=int, default=512, help="tokens computed without memory of those before")
    parser.add_argument("--prompts", type=int, default=64, help="greedy answers to compare (0: none)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each answer")
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every figure, the versions and the machine to FILE"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    try:
        text = _read(options.text)
        found = compare(
            candidates(EngineConfig(model=options.model), options.weights, options.kv, options.checkpoints),
            text,
            max_tokens=options.tokens,
            window=options.window,
            prompts=options.prompts,
            answer=options.answer,
            progress=not options.quiet,
        )
    except (ConfigError, CheckpointError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    except (KeyboardInterrupt, InterruptedError):
        print("interrupted before anything was measured", file=sys.stderr)
        return 130
    perplexity = found.baseline.perplexity
    tokens = perplexity.tokens if perplexity else 0
    print(
        f"{options.model}: {tokens:,} predictions on {options.text or 'held-out Python'}, windows of {options.window}"
    )
    print(f"\n{found}\n")
    print("KL: nats per token, of bf16's next-token distribution against this one. +-: 95 % interval.")
    print("identical: greedy answers that are still bf16's own, token for token.")
    for row in found.rows:
        if row.error:
            print(f"{row.name}: {row.error}")
    for name, bar in found.bars().items():
        verdict = "met" if bar["met"] else "missed"
        print(
            f"{name}: {bar['percent']:+.2f} % of perplexity against {bar['against']}, at most "
            f"{bar['at_most_percent']} %: {verdict}"
        )
    if options.json:
        _write(options.json, found, options, argv)
    return 130 if found.interrupted else int(any(not bar["met"] for bar in found.bars().values()))


def _read(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return file.read()


def _write(path: str, found: Comparison, options: argparse.Namespace, argv: Sequence[str] | None) -> None:
    from engine.machine import write_report

    perplexity = found.baseline.perplexity
    record = {
        "model": options.model,
        "text": options.text or "bundled held-out text",
        "seed": found.baseline.config.seed,
        "window": found.window,
        "predictions": perplexity and perplexity.tokens,
        "prompts": options.prompts,
        "bars": found.bars(),
        "formats": found.records(),
    }
    write_report(path, record, argv)

"""Plans of mixed precision, measured: how much loss each number of bits per weight leaves.

python -m workbench.sensitivity --model bundled --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from engine.config import GROUP_SIZES, EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.loader import LoadedModel, load_model
from engine.model.weight_plan import LM_HEAD, WeightPlan
from engine.quantize import quantize
from engine.quantize.layers import METHODS
from kernels import WEIGHT_FORMATS
from workbench import text as words
from workbench.quality.divergence import Baseline, Divergence
from workbench.sensitivity.assignment import frontier
from workbench.sensitivity.losses import FORMATS, PlannedWeights, Sensitivity, measure

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

    from workbench.sensitivity.figures import Mark

ROUNDED = "rtn"
BITS = (4.5, 5.0, 6.0)
BAR_BITS, BAR_PERCENT = 5.0, 1.0
"""Bar: at most this many bits per weight lose at most this much perplexity."""


@dataclass(frozen=True, slots=True)
class Point:
    """A plan that was run. kind: "uniform" (one format) or "assigned" (by sensitivity). method: of its int4 codes."""

    name: str
    kind: str
    method: str
    planned: PlannedWeights
    divergence: Divergence
    perplexity_percent: float
    perplexity_margin: float | None

    @property
    def text(self) -> str:
        margin = "" if self.perplexity_margin is None else f" +-{self.perplexity_margin:.2f}"
        return (
            f"{self.name}, {self.method}: {self.planned.bits_per_weight:.2f} bits, KL "
            f"{self.divergence.kl_mean.value:.2g}, perplexity {self.perplexity_percent:+.2f} %{margin}"
        )


@dataclass(frozen=True, slots=True)
class Frontier:
    """Measured plans beside the sensitivity they come from; an interrupted measurement holds what it has."""

    sensitivity: Sensitivity
    points: tuple[Point, ...]
    tokens: int
    interrupted: bool = False

    def bar(self) -> dict[str, Any] | None:
        """Of the plans within BAR_BITS the one of least KL, and whether it loses at most BAR_PERCENT of perplexity.

        KL picks, because the least of several noisy perplexities is flattered by its noise. None where none was run.
        """
        within = [point for point in self.points if point.planned.bits_per_weight <= BAR_BITS]
        if not within:
            return None
        best = min(within, key=lambda point: point.divergence.kl_mean.value)
        return {
            "bits_at_most": BAR_BITS,
            "percent_at_most": BAR_PERCENT,
            "plan": f"{best.name}, {best.method}",
            "bits": best.planned.bits_per_weight,
            "percent": best.perplexity_percent,
            "percent_margin": best.perplexity_margin,
            "met": best.perplexity_percent <= BAR_PERCENT,
        }

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "name": point.name,
                "kind": point.kind,
                "method": point.method,
                "weights": point.planned.plan.as_json(),
                "bits_per_weight": point.planned.bits_per_weight,
                "total_bytes": point.planned.total_bytes,
                "predicted_loss": point.planned.predicted_loss,
                "kl_mean": point.divergence.kl_mean.value,
                "kl_mean_low": point.divergence.kl_mean.low,
                "kl_mean_high": point.divergence.kl_mean.high,
                "kl_p99": point.divergence.kl_p99.value,
                "top1": point.divergence.top1.value,
                "perplexity": point.divergence.perplexity.value,
                "perplexity_percent": point.perplexity_percent,
                "perplexity_percent_margin": point.perplexity_margin,
            }
            for point in self.points
        ]

    def frame(self) -> pandas.DataFrame:
        import pandas

        return pandas.DataFrame(self.records()).drop(columns=["weights"])

    def figure(self) -> go.Figure:
        from workbench.sensitivity.figures import frontier_figure

        choices = self.sensitivity.choices()
        weights = sum(choice.nbytes // 2 for choice in choices if choice.format == "bf16")
        predicted = [(8 * one.nbytes / weights, one.loss) for one in frontier(choices) if one.loss > 0]
        model, assigned, uniform = self.sensitivity.config.model, self._marks("assigned"), self._marks("uniform")
        return frontier_figure(model, predicted, assigned, uniform)

    def _marks(self, kind: str) -> dict[str, list[Mark]]:
        """The plans of one kind by method, the fewest bits first."""
        marks: dict[str, list[Mark]] = {}
        for point in self.points:
            if point.kind == kind:
                mark = (point.planned.bits_per_weight, point.divergence.kl_mean.value, point.text)
                marks.setdefault(point.method, []).append(mark)
        return {method: sorted(of_one) for method, of_one in marks.items()}

    def __str__(self) -> str:
        return words.table([_cells(point) for point in self.points]) if self.points else "no plan was measured"


def _cells(point: Point) -> dict[str, str]:
    planned, margin = point.planned, point.perplexity_margin
    return {
        "plan": point.name,
        "int4 by": point.method,
        "bits/weight": f"{planned.bits_per_weight:.2f}",
        "all weights": words.size(planned.total_bytes),
        "KL predicted": f"{planned.predicted_loss:.4f}",
        "KL": f"{point.divergence.kl_mean.value:.4f}",
        "KL p99": f"{point.divergence.kl_p99.value:.3f}",
        "top-1": words.percent(point.divergence.top1.value, 1),
        "perplexity": f"{point.perplexity_percent:+.2f} %" + ("" if margin is None else f" +-{margin:.2f}"),
    }


def measure_frontier(
    sensitivity: Sensitivity,
    text: str | None = None,
    *,
    model: LoadedModel,
    bits: Sequence[float] = BITS,
    methods: Sequence[str] = (ROUNDED,),
    calibration: str | None = None,
    max_tokens: int = 8192,
    window: int = 512,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> Frontier:
    """Run one format for all and the assignments at `bits` per weight, and compare each with bf16 over `text`.

    `text` should not be the one that sensitivity was measured on, nor `calibration`, which `methods` other than "rtn"
    may need (engine.quantize). An interrupt, or `stopped`, ends it with what was measured.
    """
    config = replace(sensitivity.config, impl="auto")
    formats = sorted({row.format for row in sensitivity.rows}, key=list(WEIGHT_FORMATS).index)
    plans = [("uniform", name, sensitivity.uniform(name)) for name in formats]
    plans += [("assigned", f"<= {limit:g} bits", sensitivity.assign(bits_per_weight=limit)) for limit in bits]
    jobs = [(method, *plan) for method in methods for plan in plans if _worth(method, plan[2].plan)]
    points: list[Point] = []
    interrupted = False
    with Engine(replace(config, weights="bf16"), model=model) as engine:
        baseline = Baseline.record(
            engine, text, max_tokens=max_tokens, window=window, progress=progress, stopped=stopped
        )
    with tqdm(total=len(jobs), disable=not progress, desc="plans", unit="plan") as bar:
        for method, kind, name, planned in jobs:
            bar.set_postfix_str(f"{name}, {method}")
            try:
                with _opened(config, model, method, planned, calibration, progress, stopped) as (engine, held):
                    d = baseline.compare(engine, progress=progress, stopped=stopped)
            except (KeyboardInterrupt, InterruptedError):
                interrupted = True
                break
            ratio, margin = d.perplexity.ratio(baseline.perplexity)
            points.append(
                Point(name, kind, method, held, d, 100 * (ratio - 1), None if margin is None else 100 * margin)
            )
            bar.update()
    return Frontier(sensitivity, tuple(points), baseline.perplexity.tokens, interrupted)


def _worth(method: str, plan: WeightPlan) -> bool:
    """Other methods than rounding are about int4 codes."""
    return method == ROUNDED or "int4" in plan.formats


@contextmanager
def _opened(
    config: EngineConfig,
    model: LoadedModel,
    method: str,
    planned: PlannedWeights,
    calibration: str | None,
    progress: bool,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Engine, PlannedWeights]]:
    """An engine that runs the plan, and the plan as it is run: a quantizer leaves the lm_head in bf16."""
    if method == ROUNDED:
        with Engine(replace(config, weights=planned.plan), model=model) as engine:
            yield engine, planned
        return
    layers = {name: chosen for name, chosen in planned.plan.named if name != LM_HEAD}
    plan = WeightPlan.of({"default": planned.plan.default, **layers})
    quantized = quantize(
        model,
        method,
        calibration=calibration,
        weights=plan,
        group_size=config.group_size,
        device=config.device,
        bar=tqdm if progress else None,
        stopped=stopped,
    )
    with quantized, Engine(replace(config, weights="bf16"), model=quantized) as engine:
        held = WeightPlan.of({"default": plan.default, **layers, LM_HEAD: "bf16"})
        total = sum(model.spec.weight_bytes(held, config.group_size).values())
        yield engine, replace(planned, plan=held, total_bytes=total)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where no plan that was measured meets the bar, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m workbench.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), a folder, a hub id")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; its first half finds the plans and calibrates, its "
                        "second half judges them (default: bundled held-out Python)")  # fmt: skip
    parser.add_argument(
        "--formats", nargs="+", default=list(FORMATS), choices=[f for f in WEIGHT_FORMATS if f != "bf16"]
    )
    parser.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES, help="of int4")
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS), help="bits per weight to assign")
    parser.add_argument("--methods", nargs="+", default=[ROUNDED], choices=METHODS, help="of the int4 codes")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens that each matrix is measured on")
    parser.add_argument("--judge-tokens", type=int, default=16384, help="most tokens that each plan is measured on")
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every figure, the versions and the machine to FILE"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    least = min(WEIGHT_FORMATS[name].nbytes(4096, 4096, options.group_size) * 8 / 4096**2 for name in options.formats)
    if min(options.bits) < least:
        parser.error(f"--bits is {min(options.bits):g}; {', '.join(options.formats)} take {least:.2f} or more")
    try:
        text = _text(options.text)
        config = EngineConfig(model=options.model, group_size=options.group_size)
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        with load_model(config) as model:
            found = measure(
                config, options.formats, first, model=model, max_tokens=options.tokens, progress=not options.quiet
            )
            print(f"{options.model}: loss of each matrix alone over {found.tokens:,} predictions, the dearest first")
            print(found.frame().head(12).to_string(index=False))
            judged = Frontier(found, (), 0, True) if found.interrupted else measure_frontier(
                found, second, model=model, bits=options.bits, methods=options.methods, calibration=first,
                max_tokens=options.judge_tokens, progress=not options.quiet,
            )  # fmt: skip
    except (ConfigError, CheckpointError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    except (KeyboardInterrupt, InterruptedError):
        print("interrupted before anything was measured", file=sys.stderr)
        return 130
    print(f"\n{judged}\n")
    bar = judged.bar()
    if bar is not None:
        verdict = "met" if bar["met"] else "missed"
        print(f"at {bar['bits']:.2f} bits per weight (at most {BAR_BITS:g}) '{bar['plan']}' loses "
              f"{bar['percent']:+.2f} % of perplexity (at most {BAR_PERCENT:g} %): {verdict}")  # fmt: skip
    if options.json:
        _write(options.json, judged, options, argv)
    return 130 if judged.interrupted else int(bar is None or not bar["met"])


def _text(path: str | None) -> str:
    if path is None:
        from engine.bundled import heldout_text

        return heldout_text()
    with open(path, encoding="utf-8") as file:
        return file.read()


def _write(path: str, found: Frontier, options: argparse.Namespace, argv: Sequence[str] | None) -> None:
    from engine.machine import write_report

    rows = json.loads(found.sensitivity.frame().to_json(orient="records"))
    record = {
        "model": options.model,
        "text": options.text or "bundled held-out text",
        "seed": found.sensitivity.config.seed,
        "group_size": options.group_size,
        "sensitivity_predictions": found.sensitivity.tokens,
        "judged_predictions": found.tokens,
        "bar": found.bar(),
        "matrices": rows,
        "plans": found.records(),
        "interrupted": found.interrupted,
    }
    write_report(path, record, argv)

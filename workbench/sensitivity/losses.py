"""Which matrices suffer from few bits: the loss of quantizing each alone, and a plan that spends bits where they count.

    found = measure(EngineConfig())           # or: python -m workbench.sensitivity --model bundled
    plan = found.assign(bits_per_weight=5.0).plan
    Engine(EngineConfig(weights=plan))

The loss is the mean KL divergence from the bf16 model (nats per token), in float32 arithmetic so that rounding in
bfloat16, which every format shares, does not cover the small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.loading.loader import LoadedModel, load_model
from engine.model.spec import ModelSpec
from engine.model.weight_plan import LM_HEAD, WeightPlan
from kernels import WEIGHT_FORMATS
from workbench.quality import small_pool
from workbench.quality.divergence import Baseline, Estimate
from workbench.sensitivity.assignment import Choice, assign

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

FORMATS = ("int4", "int8")
Stopped = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class MatrixLoss:
    """One matrix quantized alone, everything else bf16. nbytes: with scales and zeros. loss: mean KL, nats per token.

    perplexity_percent: against bf16, with the half width of its interval; it may be negative where KL cannot.
    """

    matrix: str
    format: str
    weights: int
    nbytes: int
    loss: Estimate
    perplexity_percent: float
    perplexity_margin: float | None

    @property
    def layer(self) -> int | None:
        """None for the lm_head."""
        return int(self.matrix.split(".")[1]) if "." in self.matrix else None

    @property
    def module(self) -> str:
        return self.matrix.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class PlannedWeights:
    """What `Sensitivity.assign` found. predicted_loss: sum of the single losses. bits_per_weight: of the layers'
    matrices, scales and zeros counted; total_bytes: with embeddings, lm_head, norms and biases."""

    plan: WeightPlan
    predicted_loss: float
    bits_per_weight: float
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.bits_per_weight:.2f} bits per weight: {self.plan}"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Losses of single matrices of one model. An interrupted measurement holds what it has: `assign` then leaves the
    matrices that were not measured in bf16."""

    spec: ModelSpec
    config: EngineConfig
    rows: tuple[MatrixLoss, ...]
    tokens: int
    interrupted: bool = False

    def assign(
        self,
        *,
        budget_bytes: int | None = None,
        max_loss: float | None = None,
        bits_per_weight: float | None = None,
        head: str | None = None,
    ) -> PlannedWeights:
        """Formats by matrix for one of: bytes of all weights, a bound on the summed loss, bits per weight of the
        layers' matrices.

        head: the lm_head's format, which is not chosen by loss: it is int8 unless it is given. ConfigError where
        the bound cannot be met.
        """
        if sum(bound is not None for bound in (budget_bytes, max_loss, bits_per_weight)) != 1:
            raise ConfigError("give one of budget_bytes, max_loss and bits_per_weight")
        head = head or "int8"
        choices = self.choices()
        fixed = self._planned({}, head).total_bytes - sum(c.nbytes for c in choices if c.format == "bf16")
        smallest: dict[str, int] = {}
        for c in choices:
            smallest[c.matrix] = min(c.nbytes, smallest.get(c.matrix, c.nbytes))
        least, weights, budget = sum(smallest.values()), self._layer_weights(), None
        if budget_bytes is not None:
            budget = budget_bytes - fixed
            if budget < least:
                raise ConfigError(
                    f"budget_bytes is {budget_bytes:,}; the smallest formats take {fixed + least:,} bytes"
                )
        elif bits_per_weight is not None:
            budget = int(bits_per_weight * weights / 8)
            if budget < least:
                raise ConfigError(
                    f"bits_per_weight is {bits_per_weight:g}; the smallest formats take {8 * least / weights:.2f}"
                )
        return self._planned(assign(choices, budget_bytes=budget, max_loss=max_loss).formats, head)

    def uniform(self, name: str, head: str | None = None) -> PlannedWeights:
        """Every matrix of the layers in one format."""
        return self._planned(
            dict.fromkeys(self._layer_matrices(), name), head or ("bf16" if name == "bf16" else "int8")
        )

    def choices(self) -> list[Choice]:
        """Of each matrix in the layers: bf16 without loss, and what was measured."""
        known = {(row.matrix, row.format): row for row in self.rows}
        found = []
        for name in self._layer_matrices():
            n, k = self.spec.matrices()[name]
            found.append(Choice(name, "bf16", WEIGHT_FORMATS["bf16"].nbytes(n, k), 0.0))
            rows = [row for key, row in known.items() if key[0] == name]
            found += [Choice(name, row.format, row.nbytes, row.loss.value) for row in rows]
        return found

    def _planned(self, formats: dict[str, str], head: str) -> PlannedWeights:
        counts = {chosen: list(formats.values()).count(chosen) for chosen in formats.values()}
        default = max(counts, key=lambda name: counts[name], default="bf16")
        named = {name: formats.get(name, "bf16") for name in self._layer_matrices()}
        plan = WeightPlan.of({"default": default, **named, LM_HEAD: head})
        held = self.spec.matrix_bytes(plan, self.config.group_size)
        layers = sum(held[name] for name in self._layer_matrices())
        losses = {(row.matrix, row.format): row.loss.value for row in self.rows}
        loss = sum(losses.get((name, chosen), 0.0) for name, chosen in named.items())
        total = sum(self.spec.weight_bytes(plan, self.config.group_size).values())
        return PlannedWeights(plan, loss, 8 * layers / self._layer_weights(), total)

    def _layer_matrices(self) -> list[str]:
        return [name for name in self.spec.matrices() if name != LM_HEAD]

    def _layer_weights(self) -> int:
        return sum(n * k for name, (n, k) in self.spec.matrices().items() if name != LM_HEAD)

    def frame(self) -> pandas.DataFrame:
        """One row per matrix and format, the largest loss per byte saved first."""
        import pandas

        rows = [
            {
                "matrix": row.matrix,
                "layer": row.layer,
                "module": row.module,
                "format": row.format,
                "weights": row.weights,
                "bytes": row.nbytes,
                "loss": row.loss.value,
                "loss_low": row.loss.low,
                "loss_high": row.loss.high,
                "perplexity_percent": row.perplexity_percent,
                "perplexity_margin": row.perplexity_margin,
                "loss_per_mb_saved": 1e6 * row.loss.value / (2 * row.weights - row.nbytes),
            }
            for row in self.rows
        ]
        table = pandas.DataFrame(rows)
        return table.sort_values("loss_per_mb_saved", ascending=False, ignore_index=True) if rows else table

    def figure(self, format: str | None = None) -> go.Figure:
        """Heat map of the loss by layer and module, in `format` or the first that was measured."""
        from workbench.sensitivity.figures import heat_map

        format = format or next((row.format for row in self.rows), "int4")
        losses = {(row.layer, row.module): row.loss.value for row in self.rows if row.format == format}
        return heat_map(losses, self.spec.num_layers, format)


def measure(
    config: EngineConfig | None = None,
    formats: Sequence[str] = FORMATS,
    text: str | None = None,
    *,
    model: LoadedModel | None = None,
    max_tokens: int = 4096,
    window: int = 512,
    progress: bool = True,
    stopped: Stopped = lambda: False,
) -> Sensitivity:
    """Quantize every matrix alone, in every format, and compare with bf16 over `text` (held-out Python by default).

    config: its model, group_size and KV format count; where `impl` is "auto", float32 arithmetic is taken. model: is
    borrowed. An interrupt, or `stopped`, ends it with what was measured. ConfigError for a model whose text means
    nothing, or a format that cannot hold a matrix.
    """
    config = small_pool(replace(config or EngineConfig(), weights="bf16"))
    if config.impl == "auto":
        config = replace(config, impl="torch")
    unknown = [name for name in formats if name not in WEIGHT_FORMATS or name == "bf16"]
    if unknown:
        others = ", ".join(name for name in WEIGHT_FORMATS if name != "bf16")
        raise ConfigError(f"format is {unknown[0]!r}; it must be one of {others}")
    loaded = model or load_model(config)
    try:
        with Engine(config, model=loaded) as engine:
            baseline = Baseline.record(
                engine, text, max_tokens=max_tokens, window=window, progress=progress, stopped=stopped
            )
        rows, interrupted = _measure_each(config, loaded, formats, baseline, progress, stopped)
        return Sensitivity(loaded.spec, config, tuple(rows), baseline.perplexity.tokens, interrupted)
    finally:
        if model is None:
            loaded.close()


def _measure_each(
    config: EngineConfig,
    model: LoadedModel,
    formats: Sequence[str],
    baseline: Baseline,
    progress: bool,
    stopped: Stopped,
) -> tuple[list[MatrixLoss], bool]:
    """The rows, and whether an interrupt left some out."""
    rows: list[MatrixLoss] = []
    shapes = model.spec.matrices()
    pairs = [(name, chosen) for name in shapes for chosen in _candidates(name, formats)]
    with tqdm(total=len(pairs), disable=not progress, desc="matrices", unit="matrix") as bar:
        for name, chosen in pairs:
            bar.set_postfix_str(f"{name} {chosen}")
            plan = WeightPlan.of({"default": "bf16", LM_HEAD: "bf16", name: chosen})
            try:
                with Engine(replace(config, weights=plan), model=model) as engine:
                    found = baseline.compare(engine, stopped=stopped)
            except (KeyboardInterrupt, InterruptedError):
                return rows, True
            ratio, margin = found.perplexity.ratio(baseline.perplexity)
            n, k = shapes[name]
            rows.append(
                MatrixLoss(
                    name,
                    chosen,
                    n * k,
                    model.spec.matrix_bytes(plan, config.group_size)[name],
                    found.kl_mean,
                    100 * (ratio - 1),
                    None if margin is None else 100 * margin,
                )
            )
            bar.update()
    return rows, False


def _candidates(name: str, formats: Sequence[str]) -> Sequence[str]:
    """The lm_head is not computed in fewer than 8 bits, nor with quantized activations: it is only shown."""
    return formats if name != LM_HEAD else [chosen for chosen in formats if chosen == "int8"]

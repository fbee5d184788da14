"""What each way of quantizing costs in perplexity, calibrated on text that is not measured on.

    python -m workbench.quantizers --json FILE

For the bundled model both texts are Python's own library: calibration takes files that the model was trained on, the
measurement the excerpt that was held out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from engine.config import GROUP_SIZES, EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.loader import LoadedModel, load_model
from engine.quantize import bits_per_weight, quantize
from engine.quantize.calibration import BUDGET
from engine.quantize.layers import METHODS
from workbench import text as words
from workbench.quality import Perplexity, check_meaning, perplexity, small_pool

BASELINE = "bf16"
SHARE_OF_RTN = 0.5  # of what rounding to nearest loses, the most that the best int4 method may
CHARACTERS_PER_TOKEN = 8  # more than any text has, so that enough of it is read
BY_FORMAT = {
    "int4": ("rtn", "hqq", "awq", "gptq"),
    "w4a8": ("rtn", "gptq"),
    "w8a8": ("rtn", "smoothquant"),
}
"""Methods that are measured, by the format they write. A method's w4a8 has the codes of its int4; what it loses more is
the price of products in 8 bits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of quantizing. seconds: of the quantizer alone; None for the baseline."""

    method: str
    weights: str
    perplexity: Perplexity
    bits: float
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.method == BASELINE else f"{self.method} {self.weights}"


@dataclass(frozen=True, slots=True)
class Quantizers:
    """Methods side by side over the same text; the first row is the unquantized model."""

    rows: tuple[Measured, ...]

    def percent(self, row: Measured) -> tuple[float, float | None]:
        """Loss of perplexity against the unquantized model, and the half width of its 95 % interval."""
        ratio, margin = row.perplexity.ratio(self.rows[0].perplexity)
        return 100 * (ratio - 1), None if margin is None else 100 * margin

    def bar(self) -> dict[str, Any] | None:
        """The best int4 method against rounding to nearest; None unless both were measured."""
        losses = {row.method: self.percent(row)[0] for row in self.rows if row.weights == "int4"}
        nearest = losses.pop("rtn", None)
        if nearest is None or not losses:
            return None
        best = min(losses, key=losses.__getitem__)
        at_most = SHARE_OF_RTN * nearest
        return {"best": best, "percent": losses[best], "at_most_percent": at_most, "met": losses[best] <= at_most}

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "name": row.name,
                "method": row.method,
                "weights": row.weights,
                "bits_per_weight": row.bits,
                "perplexity": row.perplexity.value,
                "percent": self.percent(row)[0],
                "percent_margin": self.percent(row)[1],
                "seconds": row.seconds,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        return words.table([self._cells(row) for row in self.rows])

    def _cells(self, row: Measured) -> dict[str, str]:
        percent, margin = self.percent(row)
        baseline = row is self.rows[0]
        return {
            "method": row.name,
            "bits/weight": f"{row.bits:.2f}",
            "perplexity": f"{row.perplexity.value:.4f}",
            "against bf16": words.ABSENT if baseline else f"{percent:+.2f} %",
            "+-": words.ABSENT if baseline or margin is None else f"{margin:.2f}",
            "quantized in": words.seconds(row.seconds),
        }


def measure(
    config: EngineConfig,
    calibration: str,
    text: str | None = None,
    *,
    methods: Mapping[str, Sequence[str]] = BY_FORMAT,
    group_size: int = 128,
    budget: int = BUDGET,
    max_tokens: int = 65536,
    progress: bool = False,
) -> Quantizers:
    """Quantize `config.model` by each of `methods` (format -> names) and take its perplexity over `text` (the held-out
    excerpt by default).

    ConfigError for a model whose text means nothing, and as `engine.quantize.quantize`.
    """
    pairs = [(method, weights) for weights, names in methods.items() for method in names]
    rows = []
    with load_model(config) as model, _bar(len(pairs) + 1, progress) as bar:
        rows.append(Measured(BASELINE, BASELINE, _perplexity(config, model, text, max_tokens), 16.0))
        model.release()
        bar.update()
        for method, weights in pairs:
            bar.set_postfix_str(f"{method} {weights}")
            started = time.perf_counter()
            result = quantize(
                model, method, calibration=calibration, weights=weights, group_size=group_size, budget=budget,
                device=config.device, bar=tqdm if progress else None,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            found = _perplexity(config, result, text, max_tokens)
            bits = bits_per_weight(model.spec, weights, group_size)
            rows.append(Measured(method, weights, found, bits, seconds))
            result.close()
            bar.update()
    return Quantizers(tuple(rows))


def _perplexity(config: EngineConfig, model: LoadedModel, text: str | None, max_tokens: int) -> Perplexity:
    with Engine(small_pool(config), model=model) as engine:
        check_meaning(engine)
        return perplexity(engine, text, max_tokens=max_tokens)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    with tqdm(total=total, disable=not progress, desc="quantizers", unit="method", file=sys.stderr) as bar:
        yield bar


def training_text(characters: int, seed: int = 0) -> str:
    """Files that the bundled model was trained on, none of them held out, in an order that `seed` draws."""
    from engine.bundled import END_OF_TEXT
    from engine.bundled.corpus import is_held_out, stdlib_files

    files = {path: text for path, text in stdlib_files().items() if not is_held_out(path)}
    drawn = sorted(files, key=lambda path: hashlib.sha256(f"{seed}/{path}".encode()).hexdigest())
    parts: list[str] = []
    length = 0
    for path in drawn:
        if length >= characters:
            break
        parts.append(files[path] + END_OF_TEXT)
        length += len(parts[-1])
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where the best int4 method misses its bar, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m workbench.quantizers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), a folder, a hub id")
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="needed for any model but 'bundled'")
    parser.add_argument("--text", metavar="FILE", type=Path, help="to measure on (default: bundled held-out Python)")
    for weights, names in BY_FORMAT.items():
        parser.add_argument(f"--{weights}", nargs="*", default=names, choices=METHODS, help="methods")
    parser.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES, help="of int4 and w4a8")
    parser.add_argument("--budget", type=int, default=BUDGET, help="most calibration tokens (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=65536, help="most tokens to measure on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the files drawn for calibration")
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every figure, the versions and the machine to FILE"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    try:
        if options.calibration is None and options.model != "bundled":
            raise ConfigError(f"model is {options.model!r}; give --calibration, text like that which it will see")
        if options.calibration:
            calibration = options.calibration.read_text("utf-8")
        else:
            calibration = training_text(CHARACTERS_PER_TOKEN * options.budget, options.seed)
        found = measure(
            EngineConfig(model=options.model),
            calibration,
            options.text.read_text("utf-8") if options.text else None,
            methods={weights: getattr(options, weights) for weights in BY_FORMAT},
            group_size=options.group_size,
            budget=options.budget,
            max_tokens=options.tokens,
            progress=not options.quiet,
        )
    except (ConfigError, CheckpointError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    tokens = found.rows[0].perplexity.tokens
    print(f"{options.model}, 4 bits in groups of {options.group_size}: {tokens:,} predictions, {options.budget:,} "
          f"tokens of calibration at most; embeddings and lm_head bf16\n\n{found}\n")
    bar = found.bar()
    if bar is not None:
        print(f"best int4 method: {bar['best']}, {bar['percent']:+.2f} %, at most {bar['at_most_percent']:.2f} % "
              f"(half of what rounding to nearest loses): {'met' if bar['met'] else 'missed'}")
    if options.json:
        _write(options.json, found, options, argv)
    return 0 if bar is None or bar["met"] else 1


def _write(path: str, found: Quantizers, options: argparse.Namespace, argv: Sequence[str] | None) -> None:
    from engine.machine import write_report

    record = {
        "model": options.model,
        "group_size": options.group_size,
        "calibration": str(options.calibration) if options.calibration else "training split of the bundled model",
        "budget": options.budget,
        "seed": options.seed,
        "predictions": found.rows[0].perplexity.tokens,
        "rows": found.records(),
        "bar": found.bar(),
    }
    write_report(path, record, argv)


if __name__ == "__main__":
    sys.exit(main())

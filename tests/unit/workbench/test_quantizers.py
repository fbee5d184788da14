"""The comparison of quantizers: what it calibrates on, what it calls met, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bundled.corpus import is_held_out
from engine.config import EngineConfig
from engine.errors import ConfigError
from workbench import quantizers
from workbench.quality import Perplexity
from workbench.quantizers import Measured, Quantizers, main, measure, training_text


def measured(method: str, weights: str, nats: float) -> Measured:
    return Measured(method, weights, Perplexity.of([[-nats] * 20, [-nats - 0.1] * 20]), 4.25, 1.5)


BASE = Measured("bf16", "bf16", Perplexity.of([[-1.0] * 20, [-1.1] * 20]), 16.0)


def test_the_bar_is_half_of_what_rounding_to_nearest_loses() -> None:
    rows = (BASE, measured("rtn", "int4", 1.04), measured("gptq", "int4", 1.015), measured("awq", "int4", 1.03))
    bar = Quantizers((*rows, measured("smoothquant", "w8a8", 1.001))).bar()
    assert bar is not None and bar["best"] == "gptq" and bar["met"]
    assert bar["percent"] == pytest.approx(1.511, abs=1e-3) and bar["at_most_percent"] == pytest.approx(2.041, abs=1e-3)
    missed = Quantizers((*rows[:2], measured("hqq", "int4", 1.03))).bar()
    assert missed is not None and not missed["met"]
    assert Quantizers(rows[:2]).bar() is None and Quantizers((BASE, rows[2])).bar() is None


def test_the_table_and_the_record_hold_every_row() -> None:
    found = Quantizers((BASE, measured("rtn", "int4", 1.04)))
    assert "rtn int4" in str(found) and "+4.08 %" in str(found)
    baseline, row = found.records()
    assert baseline["seconds"] is None and row["percent"] == pytest.approx(4.081, abs=1e-3)


def test_calibration_takes_no_file_that_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"module_{i}.py": f"# file {i} of many\n" * 20 for i in range(300)}
    held_out = [text for path, text in files.items() if is_held_out(path)]
    assert len(held_out) > 5
    monkeypatch.setattr("engine.bundled.corpus.stdlib_files", lambda: files)
    everything = training_text(10**9)
    assert not [text for text in held_out if text in everything]
    assert all(text in everything for text in files.values() if text not in held_out)
    some = training_text(20_000)
    assert 20_000 <= len(some) < 21_000 and some == training_text(20_000) != training_text(20_000, seed=1)


def test_methods_are_measured_on_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the work: a quantizer that hands the model back, and a perplexity that counts its calls."""
    asked: list[tuple[str, str]] = []

    def quantize(model: Any, method: str, *, weights: str, calibration: str, **_: Any) -> Any:
        assert calibration == "text"
        asked.append((method, weights))
        return type("Result", (), {"close": lambda self: None})()

    monkeypatch.setattr(quantizers, "quantize", quantize)
    monkeypatch.setattr(quantizers, "_perplexity", lambda *_: Perplexity.of([[-1.0 - 0.01 * len(asked)] * 9] * 2))
    (tmp_path / "text").write_text("text")
    options = ["--calibration", str(tmp_path / "text"), "--json", str(tmp_path / "out.json"), "--quiet"]
    assert main([*options, "--int4", "gptq", "rtn", "--w4a8", "gptq", "--w8a8", "smoothquant"]) == 0
    assert asked == [("gptq", "int4"), ("rtn", "int4"), ("gptq", "w4a8"), ("smoothquant", "w8a8")]
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["bf16", "gptq int4", "rtn int4", "gptq w4a8", "smoothquant w8a8"]
    bits = [16.0, 4.25, 4.25, pytest.approx(4.32, abs=0.02), pytest.approx(8.03, abs=0.02)]
    assert [row["bits_per_weight"] for row in record["rows"]] == bits
    assert record["bar"]["met"] and record["machine"]["versions"]["torch"] == torch.__version__
    assert "met" in capsys.readouterr().out


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="random"):
        measure(EngineConfig(model="synthetic:tiny", memory_limit=64 << 20), "text")
    with pytest.raises(SystemExit):
        main(["--model", "synthetic:tiny"])
    assert "give --calibration" in capsys.readouterr().err

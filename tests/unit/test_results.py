"""The README quotes what was measured, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench import results
from workbench.results import bars, gpu_table

ROOT = Path(__file__).parents[2]


def test_the_readme_holds_the_tables_of_the_committed_measurements() -> None:
    readme = (ROOT / "README.md").read_text()
    assert bars() in readme
    assert gpu_table() in readme


def test_what_is_measured_later_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads((results.ENGINE / "h200-peers-w8a8.json").read_text())
    rows = []
    monkeypatch.setattr(results, "ENGINE", tmp_path)
    for weights in ("w8a8", "w4a8"):
        run = {"config": {"weights": weights, "kv": "k8v4"}, "ttft": {"ttft_ms": 98.76}}
        (tmp_path / f"h200-peers-{weights}.json").write_text(json.dumps(report | {"suites": {"peers": [run]}}))
        rows.append(f"| InferLab: weights {weights}, KV k8v4 |  |  |  | 98.8 |  |  |")
        assert gpu_table().splitlines()[4:] == rows, "behind the caption, which names the GPU, and the head"
    (tmp_path / "h200-others.json").write_text(json.dumps({"rows": [OTHER]}))
    rows.append("| An engine: int4 | 1.25 |  | 4.00 |  | 9,876 |  |")
    assert gpu_table().splitlines()[4:] == rows, "what was not measured of another engine is left empty too"


OTHER = {"engine": "An engine", "formats": "int4", "tpot_ms": {"1": 1.25, "64": 4.0}, "tokens_per_s": 9876}


def test_ratios_are_of_the_rows_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {("bf16", "bf16"): 100.0, ("w8a8", "k8v4"): 150.0, ("w4a8", "k8v4"): 125.0}
    for (weights, kv), speed in speeds.items():
        run = {"config": {"weights": weights, "kv": kv}, "offline": {"tokens_per_s": speed}}
        (tmp_path / f"h200-peers-{weights}.json").write_text(json.dumps({"suites": {"peers": [run]}}))
    fits = [{"kv": kv, "ratio": ratio} for kv, ratio in (("bf16", 1.0), ("int4", 3.5), ("int8", 1.75))]
    (tmp_path / "h200-kvfit.json").write_text(json.dumps({"suites": {"kvfit": fits}}))
    monkeypatch.setattr(results, "ENGINE", tmp_path)
    assert results._offline_ratios() == "1.25x, 1.50x" and results._fitting() == "1.75x, 3.50x"

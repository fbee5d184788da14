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
        rows.append(f"| weights {weights}, KV k8v4 |  |  |  | 98.8 |  |  |")
        assert gpu_table().splitlines()[2:-2] == rows

"""The README quotes what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path

from workbench.results import bars, gpu_table

ROOT = Path(__file__).parents[2]


def test_the_readme_holds_the_tables_of_the_committed_measurements() -> None:
    readme = (ROOT / "README.md").read_text()
    assert bars() in readme
    assert gpu_table() in readme

"""Runs `interpret/` in a process of its own: Triton decides at import whether kernels are interpreted, so it cannot be
mixed in here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter() -> None:
    command = [
        sys.executable, "-m", "pytest", str(HERE / "interpret"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

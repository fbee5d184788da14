"""What a figure needs beside it to mean anything: machine, versions, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy")


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Processor, cores in use, GPU, versions, and the command that is running."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    words = ["python", "-m", _module(), *_portable(sys.argv[1:] if argv is None else argv)]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "command": shlex.join(words),
    }


def write_report(path: str | Path, figures: Mapping[str, Any], argv: Sequence[str] | None = None) -> None:
    """Write figures as JSON, behind machine, versions and command."""
    report = {"machine": describe_machine(argv), **figures}
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _portable(argv: Sequence[str]) -> list[str]:
    """The words, without the folder that the report goes to, which no other machine has."""
    behind = ["", *argv]
    return [Path(word).name if before == "--json" else word for before, word in zip(behind, argv, strict=False)]


def _module() -> str:
    """The name after `python -m`; the file's where a script was started otherwise."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def _processor() -> str:
    """Linux tells the model in /proc/cpuinfo; elsewhere platform's own word."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

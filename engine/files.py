"""Where a command writes what it measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def writable(path: str) -> str:
    """For argparse, so that a file that cannot be written is refused before minutes are spent on what goes into it."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: there is no folder {str(folder)!r}")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: it is a folder, or not yours to write")
    return path

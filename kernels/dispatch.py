"""Choosing an implementation: a plain dict per operation, and one function that reads it.

`impl` is "torch" (the readable oracle, any device), "aten" (ATen's packed CPU operators), "triton" (our kernels; a CUDA
device, or Triton's interpreter) or "auto". A choice that cannot run where the tensors are raises: nothing falls back
silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Implementations = Mapping[str, Callable[..., Any]]


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1, read by Triton itself at import)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose(op: str, impls: Implementations, impl: str, device: torch.device) -> Callable[..., Any]:
    """The function registered for `impl` ("auto": triton on CUDA, aten on CPU); ValueError for a name that is not in
    `impls`."""
    if impl == "auto":
        impl = "triton" if device.type == "cuda" else "aten"
    if impl not in impls:
        raise ValueError(f"{op}: impl must be 'auto' or one of {sorted(impls)}, not {impl!r}")
    if impl == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"{op}: impl 'triton' needs CUDA tensors, these are on {device}; use 'torch' or 'aten'")
    if impl == "aten" and device.type != "cpu":
        raise ValueError(f"{op}: impl 'aten' needs CPU tensors, these are on {device}; use 'torch' or 'triton'")
    return impls[impl]

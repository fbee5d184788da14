"""Which device computes, by which implementation, and what the user is told of the choice."""

from __future__ import annotations

import platform
from collections.abc import Collection

import torch

from engine.errors import ConfigError
from kernels.formats.cpu_layouts import has_mkldnn_linear, has_packed_int8
from kernels.formats.packed import PackedWeight
from kernels.tuning import table

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which tensor cores take bfloat16, in which every kernel computes: Ampere (2020) and later."""


def resolve_device(name: str) -> torch.device:
    """ "auto" takes a GPU where there is one that the kernels run on. ConfigError for "cuda" without a CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device here; use 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available() or (name == "auto" and _too_old()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_impl(impl: str, device: torch.device) -> None:
    """ConfigError where `impl` cannot run on `device`."""
    needs = {"aten": "cpu", "triton": "cuda"}.get(impl, device.type)
    if needs != device.type:
        raise ConfigError(f"impl is {impl!r}, which needs device {needs!r}, not {device.type!r}; 'auto' always fits")
    if device.type == "cuda" and impl != "torch" and (found := _too_old()):
        raise ConfigError(f"{found}; use device 'cpu', or impl 'torch' for the slow reference on this GPU")


def device_label(device: torch.device, asked: str) -> str:
    """What computes; where "auto" was asked for and left a GPU aside, that too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    left = _too_old() if asked == "auto" and torch.cuda.is_available() else None
    name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return name if left is None else f"{name}, not the GPU: {left}"


def impl_label(impl: str, device: torch.device, weights: Collection[PackedWeight] = ()) -> str:
    """The implementation in use, and whether a faster one exists for `weights`, the matrices it multiplies by."""
    fast = "triton" if device.type == "cuda" else "aten"
    if impl == "torch":
        return f"impl torch in float32: the reference path, not the fast one ({fast})"
    if device.type == "cpu":
        ways = {"bf16": has_mkldnn_linear(), "w8a8": has_packed_int8() or all(w.format != "w8a8" for w in weights)}
        plain = " and ".join(name for name, packed in ways.items() if not packed)
        lacks = f"; plain {plain} linear, oneDNN's packed one is not available here" if plain else ""
        return f"impl {fast} in bfloat16{lacks}"
    left = _not_taken(weights)
    return f"impl {fast} in bfloat16" + (f" ({'; '.join(left)})" if left else "")


def _not_taken(weights: Collection[PackedWeight]) -> list[str]:
    """The fast ways of the kernels that are not gone on the current GPU, or with a group size."""
    from kernels.products.matmul_triton import by_hopper

    ways = {
        "tiles by rule, none are tuned for this GPU": bool(table()),
        "4-bit weights without the kernel for Hopper and groups of 128": all(
            by_hopper(weight) for weight in weights if weight.layout == "planes"
        ),
        "int8 weights without the kernel for Hopper": all(
            by_hopper(weight) for weight in weights if weight.layout == "pairs"
        ),
    }
    return [way for way, taken in ways.items() if not taken]


def _too_old() -> str | None:
    """Why the kernels do not run on the current GPU, if they do not."""
    found = torch.cuda.get_device_capability()
    if found >= LEAST_CAPABILITY:
        return None
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, and bfloat16 in tensor cores "
        f"needs {least}"
    )

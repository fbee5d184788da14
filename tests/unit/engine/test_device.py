"""Which device is taken, and what is said of one that is not."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.running import device
from engine.running.device import check_impl, device_label, impl_label, resolve_device
from kernels import pack_weight


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (
        ("is_available", True), ("current_device", 0), ("get_device_capability", (7, 5)),
        ("get_device_name", "Tesla T4"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)


def test_a_gpu_without_bf16_is_left_aside_and_the_user_told(old_gpu: None) -> None:
    taken = resolve_device("auto")
    assert taken.type == "cpu" and resolve_device("cuda").type == "cuda"
    assert "not the GPU: Tesla T4 has compute capability 7.5" in device_label(taken, "auto")
    assert "Tesla" not in device_label(taken, "cpu")  # asked for


def test_its_kernels_are_refused_but_not_the_reference(old_gpu: None) -> None:
    gpu = torch.device("cuda", 0)
    for impl in ("auto", "triton"):
        with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5.* needs 8\.0; use device 'cpu'"):
            check_impl(impl, gpu)
    check_impl("torch", gpu)


def test_a_gpu_that_fits_is_taken(old_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert resolve_device("auto").type == "cuda"
    check_impl("auto", torch.device("cuda", 0))
    assert "GPU" not in device_label(torch.device("cpu"), "auto")


def test_a_run_without_tuned_tiles_or_the_kernel_for_hopper_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul_triton = pytest.importorskip("kernels.products.matmul_triton")
    gpu, slow = torch.device("cuda", 0), "4-bit weights without the kernel for Hopper and groups of 128"
    dense = torch.zeros(64, 128)
    bf16 = pack_weight(dense, "bf16", device="cpu", layout="plain")
    int8 = pack_weight(dense, "int8", device="cpu", layout="pairs")
    groups = {g: pack_weight(dense, "int4", group_size=g, device="cpu", layout="planes") for g in (64, 128)}
    monkeypatch.setattr(device, "table", lambda: {("planes", 1, 4096, 4096): {}})
    for hopper in (True, False):
        monkeypatch.setattr(matmul_triton, "warp_group_products", lambda hopper=hopper: hopper)
        plain = "impl triton in bfloat16"
        assert impl_label("auto", gpu, [bf16]) == plain
        assert impl_label("auto", gpu, [bf16, groups[128]]) == (plain if hopper else f"{plain} ({slow})")
        assert impl_label("auto", gpu, [groups[128], groups[64]]) == f"{plain} ({slow})"
        left = "int8 weights without the kernel for Hopper"
        assert impl_label("auto", gpu, [bf16, int8]) == (plain if hopper else f"{plain} ({left})")
    monkeypatch.setattr(device, "table", dict)
    assert impl_label("auto", gpu, groups.values()).endswith(f"(tiles by rule, none are tuned for this GPU; {slow})")
    assert "reference path" in impl_label("torch", gpu)


def test_a_cpu_without_packed_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "has_mkldnn_linear", lambda: True)
    assert "not available" not in impl_label("auto", cpu)
    monkeypatch.setattr(device, "has_mkldnn_linear", lambda: False)
    assert "oneDNN's packed one is not available here" in impl_label("auto", cpu)


def test_a_cpu_without_packed_int8_says_so_of_w8a8(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, dense = torch.device("cpu"), torch.zeros(64, 128)
    int8, w8a8 = (pack_weight(dense, format, device="cpu") for format in ("int8", "w8a8"))
    monkeypatch.setattr(device, "has_mkldnn_linear", lambda: True)
    for packed, words in ((True, ""), (False, "; plain w8a8 linear, oneDNN's packed one is not available here")):
        monkeypatch.setattr(device, "has_packed_int8", lambda packed=packed: packed)
        assert impl_label("auto", cpu, [int8]) == "impl aten in bfloat16"
        assert impl_label("auto", cpu, [int8, w8a8]) == f"impl aten in bfloat16{words}"

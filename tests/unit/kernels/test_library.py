"""The operators `inferlab::...`: PyTorch's own checks of schema, fake and dispatch, and what torch.compile sees."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import library
from kernels.library import OPERATORS, Operators, _fields, _parts
from kernels.rows import rounding

HEADS, KV_HEADS, DIM, T = 4, 2, 64, 5


@pytest.fixture(scope="module")
def ops() -> Operators:
    return library.register()


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight(format: str, n: int = 96, k: int = 128) -> kernels.PackedWeight:
    layout = "plain" if format == "bf16" else None
    return kernels.pack_weight(torch.randn(n, k), format, device="cpu", layout=layout)


def layer(format: str) -> kernels.KVLayer:
    held = kernels.allocate_kv(format, 4, 16, KV_HEADS, DIM, "cpu")
    k, v = bf16(64, KV_HEADS, DIM, seed=1), bf16(64, KV_HEADS, DIM, seed=2)
    kernels.write_kv(held, k, v, torch.arange(64))
    return held


def turn(rows: int) -> Tensor:
    angles = torch.outer(torch.arange(64), 10000.0 ** (-torch.arange(0, DIM, 2) / DIM))
    return kernels.rotation(torch.arange(rows), torch.cat((angles.cos(), angles.sin()), -1))


TABLES = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
LENGTHS = torch.tensor([20, 7], dtype=torch.int32)
STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)
SLOTS = torch.tensor([3, 0, -1, 17, 40])


def samples(impl: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Every operator with arguments as the engine would give them."""
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("linear", (bf16(T, 128), None, *_fields(weight(format)), bias, impl))
        for format in kernels.WEIGHT_FORMATS
        for bias in (None, bf16(96))
    ]
    eight = rounding.quantize_rows(bf16(2, 20, 128), torch.int8)
    found += [("linear", (eight.codes, eight.scale, *_fields(weight("w8a8")), None, impl))]
    found += [("rms_norm", (bf16(T, 48), bf16(48), 1e-5, impl)), ("silu_mul", (bf16(T, 48), impl))]
    found += [("add_rms_norm", (bf16(T, 48), bf16(T, 48), bf16(48), 1e-5, impl))]
    for codes in (torch.int8, torch.float8_e4m3fn):
        found += [("quantize_rows", (bf16(2, T, 48), codes, impl)), ("quantized_silu_mul", (bf16(T, 48), codes, impl))]
        found += [("quantized_add_rms_norm", (bf16(T, 48), bf16(T, 48), bf16(48), 1e-5, codes, impl))]
        found += [("quantized_rms_norm", (bf16(T, 48), bf16(48), 1e-5, codes, impl))]
    q, qkv = bf16(T, HEADS, DIM), bf16(T, (HEADS + 2 * KV_HEADS) * DIM)
    norms = (bf16(DIM), bf16(DIM), 1e-6)
    found += [("rope", (q, bf16(T, KV_HEADS, DIM), turn(T), impl))]
    found += [("rotation", (torch.tensor([3, 0, 9]), torch.randn(10, DIM), impl))]
    for format in ("bf16", "k8v4"):
        held = _parts(layer(format))
        k, v = bf16(T, KV_HEADS, DIM), bf16(T, KV_HEADS, DIM, seed=4)
        found += [("write_kv", (*held, k, v, SLOTS, impl))]
        found += [("rope_write", (qkv, *held, SLOTS, turn(T), *extra, impl)) for extra in ((None, None, 0.0), norms)]
        found += [("decode_attention", (q[:2], *held, TABLES, LENGTHS, 0.125, impl))]
        found += [("prefill_attention", (q, *held, TABLES, STARTS, LENGTHS, 0.125, impl))]
    return found


@pytest.mark.parametrize("impl", ["torch", "aten"])
@pytest.mark.parametrize("name", OPERATORS)
def test_schema_fake_and_dispatch(ops: Operators, name: str, impl: str) -> None:
    checked = 0
    for sample, args in samples(impl):
        if sample == name:
            checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
            if torch.float8_e4m3fn in [getattr(arg, "dtype", arg) for arg in args]:
                checks = ["test_faketensor"]  # the others compare results, which ATen cannot for e4m3
            torch.library.opcheck(getattr(torch.ops.inferlab, name), args, test_utils=checks)
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("impl", ["torch", "aten"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["transposed", "partials"])
def test_a_tracer_is_told_the_truth(ops: Operators, kind: str, dtype: torch.dtype, impl: str) -> None:
    """Shape, dtype and strides, for inputs whose results would look like them: views, and partials that are summed."""
    x, residual, norm = bf16(48, T).to(dtype).t(), bf16(48, T, seed=1).to(dtype).t(), bf16(48)
    if kind == "partials":
        x = bf16(3, T, 48).to(dtype)
    for name, args in (
        ("add_rms_norm", (x, residual, norm, 1e-5, impl)),
        ("silu_mul", (x, impl)),
        ("quantize_rows", (residual, torch.int8, impl)),
        ("quantized_rms_norm", (residual, norm, 1e-5, torch.int8, impl)),
        ("quantized_add_rms_norm", (x, residual, norm, 1e-5, torch.int8, impl)),
        ("quantized_silu_mul", (x, torch.int8, impl)),
    ):
        real, told = getattr(torch.ops.inferlab, name)(*args), OPERATORS[name].fake(*args)
        for got, said in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, told)), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (said.shape, said.dtype, said.stride()), name


def nodes(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("format, kv", [("int8", "int8"), ("w8a8", "bf16"), ("int4", "k8v4")])
def test_a_layer_compiles_to_one_operator_each(ops: Operators, format: str, kv: str, backend: str) -> None:
    hidden = HEADS * DIM
    held, cache = {
        name: weight(format, n, k)
        for name, n, k in (("qkv", hidden + 2 * KV_HEADS * DIM, hidden), ("o", hidden, hidden),
                           ("gate_up", 512, hidden), ("down", hidden, 256))
    }, [layer(kv), layer(kv)]  # fmt: skip
    norm, turns = bf16(hidden, seed=7), turn(2)

    def step(ops: Any, residual: Tensor, cache: kernels.KVLayer) -> Tensor:
        x = ops.rms_norm(residual, norm, 1e-5)
        q = ops.rope_write(ops.linear(x, held["qkv"]), cache, torch.tensor([19, 54]), turns)
        x = ops.decode_attention(q, cache, TABLES, LENGTHS, DIM**-0.5).flatten(1)
        x, residual = ops.add_rms_norm(ops.linear(x, held["o"]), residual, norm, 1e-5)
        return residual + ops.linear(ops.silu_mul(ops.linear(x, held["gate_up"])), held["down"])

    graphs: list[torch.fx.GraphModule] = []

    def watching(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=watching)
    x = bf16(2, hidden, seed=3)
    with torch.inference_mode():
        got = compiled(ops, x, cache[0])
        want = step(kernels, x, cache[1])
    assert torch.equal(got, want) and torch.equal(cache[0].key, cache[1].key)
    (graph,) = graphs
    names = [name.split(".")[-1 if name.count(".") == 1 else 1] for name in nodes(graph) if "inferlab" in name]
    expected = ["rms_norm", "linear", "rope_write", "decode_attention", "linear", "add_rms_norm", "linear", "silu_mul"]
    assert names == [*expected, "linear"]
    torch._dynamo.reset()


def test_activations_travel_as_their_fields(ops: Operators) -> None:
    """Norm to codes to product, with a number of rows that changes: one graph, and what the plain functions compute."""
    down, norm = weight("w8a8", 48, 128), bf16(128)

    def step(ops: Any, x: Tensor) -> Tensor:
        eight, total = ops.quantized_add_rms_norm(x, x, norm, 1e-5, torch.int8)
        return ops.linear(eight, down) + total[:, :48]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for rows in (20, 33):
        x = bf16(rows, 128, seed=rows)
        assert torch.equal(compiled(ops, x), step(Plain, x))
    torch._dynamo.reset()


class Plain:
    """The functions as the package gives them."""

    linear = staticmethod(kernels.linear)
    quantized_add_rms_norm = staticmethod(rounding.quantized_add_rms_norm)


def test_importing_registers_nothing_and_registering_twice_changes_nothing() -> None:
    script = (
        "import torch, kernels, kernels.library as library\n"
        "assert not hasattr(torch.ops.inferlab, 'linear'), 'registered by import'\n"
        "one, two = library.register(), library.register()\n"
        "assert one is two\n"
        "assert all(hasattr(torch.ops.inferlab, name) for name in library.OPERATORS)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_codes_remember_the_dtype_they_stand_for(ops: Operators) -> None:
    gate_up = torch.randn(T, 48)
    got, want = ops.quantized_silu_mul(gate_up, torch.int8), rounding.quantized_silu_mul(gate_up, torch.int8)
    assert got.dtype == want.dtype == torch.float32


def test_errors_come_through(ops: Operators) -> None:
    with pytest.raises(ValueError, match="x has 64 features"):
        ops.linear(bf16(2, 64), weight("int8"))

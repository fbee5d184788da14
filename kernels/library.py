"""The operations as operators `inferlab::...`, for torch.compile, torch.export and everything else that traces.

Traced as plain Python an operation would come apart into its checks, its choice of implementation and ATen's operators,
or break the graph at a Triton launch. As an operator it is one node with a known result. Operators take tensors and
numbers, so dataclasses are passed as their fields; `register` returns functions with the signatures of the package that
do so:

    ops = kernels.library.register()
    step = torch.compile(lambda x: ops.silu_mul(ops.linear(x, gate_up)), fullgraph=True)

Nothing is registered by importing: PyTorch's table of operators belongs to the process, so the caller decides to write
to it, once, and calling again changes nothing. The engine does not: it replays CUDA graphs of the plain functions, and
a call through the dispatcher costs more than a small kernel on a CPU.

A product here is always complete (`partial` has a shape that only the kernel knows), attention derives its own plan,
and weights in oneDNN's layouts (bf16, large w8a8 on a CPU) cannot be traced: pack them with layout="plain".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .formats.packed import PackedWeight
from .paged import attention, kv_access, qkv
from .paged.kv_cache import KV_FORMATS, KVLayer
from .paged.qkv import HeadNorms
from .products import matmul
from .rows import elementwise, rounding
from .rows.activations import Activations

NAMESPACE = "inferlab"
_WEIGHT = (
    "Tensor data, Tensor? scale, Tensor? nibble_scale, Tensor? order, Tensor? channel, str format, str layout, "
    "SymInt n, SymInt k, SymInt? group_size"
)
_KV = "Tensor key, Tensor value, Tensor? key_scale, Tensor? value_scale, str kv_format, SymInt head_dim"
_KV_WRITTEN = (
    "Tensor(a!) key, Tensor(b!) value, Tensor(c!)? key_scale, Tensor(d!)? value_scale, str kv_format, SymInt head_dim"
)
_WRITTEN = ("key", "value", "key_scale", "value_scale")


@dataclass(frozen=True)
class Operator:
    """Schema, what runs, what it returns of which shape and dtype, and the arguments it writes to."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    mutates: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def register() -> Operators:
    """Define every operator of `OPERATORS`, once in a process; the functions that call them."""
    for name, operator in OPERATORS.items():
        defined = torch.library.custom_op(
            f"{NAMESPACE}::{name}", operator.run, mutates_args=operator.mutates, schema=operator.schema
        )
        defined.register_fake(operator.fake)
    return Operators()


class Operators:
    """The package's operations, each one operator; made by `register`. Arguments and results as in `kernels`."""

    def linear(
        self, x: Tensor | Activations, weight: PackedWeight, bias: Tensor | None = None, *, impl: str = "auto"
    ) -> Tensor:
        """x in 8 bits gives bfloat16."""
        codes, scale = (x.codes, x.scale) if isinstance(x, Activations) else (x, None)
        return _ops().linear(codes, scale, *_fields(weight), bias, impl)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
        return _ops().rms_norm(x, weight, eps, impl)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        return _ops().add_rms_norm(x, residual, weight, eps, impl)

    def silu_mul(self, gate_up: Tensor, *, impl: str = "auto") -> Tensor:
        return _ops().silu_mul(gate_up, impl)

    def quantize_rows(self, x: Tensor, codes: torch.dtype, *, impl: str = "auto") -> Activations:
        found, scale = _ops().quantize_rows(x, codes, impl)
        return Activations(found, scale, x.dtype)

    def quantized_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, codes: torch.dtype, *, impl: str = "auto"
    ) -> Activations:
        found, scale = _ops().quantized_rms_norm(x, weight, eps, codes, impl)
        return Activations(found, scale, x.dtype)

    def quantized_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype, *, impl: str = "auto"
    ) -> tuple[Activations, Tensor]:
        found, scale, total = _ops().quantized_add_rms_norm(x, residual, weight, eps, codes, impl)
        return Activations(found, scale, residual.dtype), total

    def quantized_silu_mul(self, gate_up: Tensor, codes: torch.dtype, *, impl: str = "auto") -> Activations:
        found, scale = _ops().quantized_silu_mul(gate_up, codes, impl)
        return Activations(found, scale, torch.bfloat16 if gate_up.dim() == 3 else gate_up.dtype)

    def rope(self, q: Tensor, k: Tensor, turn: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
        return _ops().rope(q, k, turn, impl)

    def rotation(self, positions: Tensor, cos_sin: Tensor, *, impl: str = "auto") -> Tensor:
        return _ops().rotation(positions, cos_sin, impl)

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor, *, impl: str = "auto") -> None:
        _ops().write_kv(*_parts(layer), k, v, slots, impl)

    def rope_write(
        self, qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: HeadNorms | None = None, *,
        impl: str = "auto",
    ) -> Tensor:
        return _ops().rope_write(qkv, *_parts(layer), slots, turn, *(norms or (None, None, 0.0)), impl)

    def decode_attention(
        self, q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float, *, impl: str = "auto"
    ) -> Tensor:
        return _ops().decode_attention(q, *_parts(layer), block_tables, lengths, scale, impl)

    def prefill_attention(
        self, q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float, *,
        impl: str = "auto",
    ) -> Tensor:
        return _ops().prefill_attention(q, *_parts(layer), block_tables, query_starts, lengths, scale, impl)


def _ops() -> Any:
    return torch.ops.inferlab


def _fields(weight: PackedWeight) -> tuple[Any, ...]:
    return (
        weight.data, weight.scale, weight.nibble_scale, weight.order, weight.channel, weight.format, weight.layout,
        *weight.shape, weight.group_size,
    )  # fmt: skip


def _parts(layer: KVLayer) -> tuple[Any, ...]:
    return layer.key, layer.value, layer.key_scale, layer.value_scale, layer.format.name, layer.head_dim


# What runs. Results are contiguous and share no memory, as PyTorch asks of an operator that is not a view.


def _own(*results: Tensor) -> tuple[Tensor, ...]:
    return tuple(result.clone(memory_format=torch.contiguous_format) if result._is_view() else result.contiguous()
                 for result in results)  # fmt: skip


def _linear(
    x: Tensor, x_scale: Tensor | None, data: Tensor, scale: Tensor | None, nibble_scale: Tensor | None,
    order: Tensor | None, channel: Tensor | None, format: str, layout: str, n: int, k: int, group_size: int | None,
    bias: Tensor | None, impl: str,
) -> Tensor:
    weight = PackedWeight(format, layout, (n, k), data, scale, group_size, nibble_scale, order, channel)
    given = x if x_scale is None else Activations(x, x_scale, torch.bfloat16)
    return _own(matmul.linear(given, weight, bias, impl=impl))[0]


def _quantize_rows(x: Tensor, codes: torch.dtype, impl: str) -> tuple[Tensor, ...]:
    found = rounding.quantize_rows(x, codes, impl=impl)
    return _own(found.codes, found.scale)


def _quantized_rms_norm(
    x: Tensor, weight: Tensor, eps: float, codes: torch.dtype, impl: str
) -> tuple[Tensor, ...]:
    found = rounding.quantized_rms_norm(x, weight, eps, codes, impl=impl)
    return _own(found.codes, found.scale)


def _quantized_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype, impl: str
) -> tuple[Tensor, ...]:
    found, total = rounding.quantized_add_rms_norm(x, residual, weight, eps, codes, impl=impl)
    return _own(found.codes, found.scale, total)


def _quantized_silu_mul(gate_up: Tensor, codes: torch.dtype, impl: str) -> tuple[Tensor, ...]:
    found = rounding.quantized_silu_mul(gate_up, codes, impl=impl)
    return _own(found.codes, found.scale)


def _layer(
    key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, format: str, head_dim: int
) -> KVLayer:
    return KVLayer(KV_FORMATS[format], head_dim, key, value, key_scale, value_scale)


def _write_kv(*args: Any) -> None:
    *held, k, v, slots, impl = args
    kv_access.write_kv(_layer(*held), k, v, slots, impl=impl)


def _rope_write(x: Tensor, *args: Any) -> Tensor:
    *held, slots, turn, q_norm, k_norm, eps, impl = args
    norms = None if q_norm is None else (q_norm, k_norm, eps)
    return _own(qkv.rope_write(x, _layer(*held), slots, turn, norms, impl=impl))[0]


def _decode_attention(q: Tensor, *args: Any) -> Tensor:
    *held, block_tables, lengths, scale, impl = args
    return _own(attention.decode_attention(q, _layer(*held), block_tables, lengths, scale, impl=impl))[0]


def _prefill_attention(q: Tensor, *args: Any) -> Tensor:
    *held, block_tables, query_starts, lengths, scale, impl = args
    out = attention.prefill_attention(q, _layer(*held), block_tables, query_starts, lengths, scale, impl=impl)
    return _own(out)[0]


# What a tracer is told: shapes and dtypes.


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape or x.shape, dtype=dtype or x.dtype)


def _fake_linear(x: Tensor, x_scale: Tensor | None, *weight: Any) -> Tensor:
    return _like(x, *x.shape[:-1], weight[7], dtype=x.dtype if x_scale is None else torch.bfloat16)


def _fake_codes(x: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _like(x, dtype=codes), x.new_empty(x.shape[:-1], dtype=wide)


def _fake_inner(gate_up: Tensor) -> Tensor:
    """Of gate and up [..., 2I], or partials [S, T, 2I]."""
    rows = gate_up.shape[1:-1] if gate_up.dim() == 3 else gate_up.shape[:-1]
    return gate_up.new_empty((*rows, gate_up.shape[-1] // 2))


def _fake_queries(qkv: Tensor, *args: Any) -> Tensor:
    key, head_dim = args[0], args[5]
    return _like(qkv, qkv.shape[-2], qkv.shape[-1] // head_dim - 2 * key.shape[2], head_dim)


OPERATORS: dict[str, Operator] = {
    "linear": Operator(
        f"(Tensor x, Tensor? x_scale, {_WEIGHT}, Tensor? bias, str impl) -> Tensor", _linear, _fake_linear
    ),
    "rms_norm": Operator(
        "(Tensor x, Tensor weight, float eps, str impl) -> Tensor",
        lambda x, weight, eps, impl: _own(elementwise.rms_norm(x, weight, eps, impl=impl))[0],
        lambda x, weight, eps, impl: _like(x),
    ),
    "add_rms_norm": Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps, str impl) -> (Tensor, Tensor)",
        lambda x, residual, weight, eps, impl: _own(*elementwise.add_rms_norm(x, residual, weight, eps, impl=impl)),
        lambda x, residual, weight, eps, impl: (_like(residual), _like(residual)),
    ),
    "silu_mul": Operator(
        "(Tensor gate_up, str impl) -> Tensor",
        lambda gate_up, impl: _own(elementwise.silu_mul(gate_up, impl=impl))[0],
        lambda gate_up, impl: _fake_inner(gate_up),
    ),
    "quantize_rows": Operator(
        "(Tensor x, ScalarType codes, str impl) -> (Tensor, Tensor)",
        _quantize_rows,
        lambda x, codes, impl: _fake_codes(x, codes),
    ),
    "quantized_rms_norm": Operator(
        "(Tensor x, Tensor weight, float eps, ScalarType codes, str impl) -> (Tensor, Tensor)",
        _quantized_rms_norm,
        lambda x, weight, eps, codes, impl: _fake_codes(x, codes),
    ),
    "quantized_add_rms_norm": Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType codes, str impl) -> "
        "(Tensor, Tensor, Tensor)",
        _quantized_add_rms_norm,
        lambda x, residual, weight, eps, codes, impl: (*_fake_codes(residual, codes), _like(residual)),
    ),
    "quantized_silu_mul": Operator(
        "(Tensor gate_up, ScalarType codes, str impl) -> (Tensor, Tensor)",
        _quantized_silu_mul,
        lambda gate_up, codes, impl: _fake_codes(_fake_inner(gate_up), codes),
    ),
    "rope": Operator(
        "(Tensor q, Tensor k, Tensor turn, str impl) -> (Tensor, Tensor)",
        lambda q, k, turn, impl: _own(*elementwise.rope(q, k, turn, impl=impl)),
        lambda q, k, turn, impl: (_like(q), _like(k)),
    ),
    "rotation": Operator(
        "(Tensor positions, Tensor cos_sin, str impl) -> Tensor",
        lambda positions, cos_sin, impl: _own(elementwise.rotation(positions, cos_sin, impl=impl))[0],
        lambda positions, cos_sin, impl: _like(cos_sin, positions.shape[0], 2, cos_sin.shape[1]),
    ),
    "write_kv": Operator(
        f"({_KV_WRITTEN}, Tensor k, Tensor v, Tensor slots, str impl) -> ()", _write_kv, lambda *args: None, _WRITTEN
    ),
    "rope_write": Operator(
        f"(Tensor qkv, {_KV_WRITTEN}, Tensor slots, Tensor turn, Tensor? q_norm, Tensor? k_norm, float eps, str impl) "
        "-> Tensor",
        _rope_write,
        _fake_queries,
        _WRITTEN,
    ),
    "decode_attention": Operator(
        f"(Tensor q, {_KV}, Tensor block_tables, Tensor lengths, float scale, str impl) -> Tensor",
        _decode_attention,
        lambda q, *args: _like(q),
    ),
    "prefill_attention": Operator(
        f"(Tensor q, {_KV}, Tensor block_tables, Tensor query_starts, Tensor lengths, float scale, str impl) -> Tensor",
        _prefill_attention,
        lambda q, *args: _like(q),
    ),
}

"""One decoder for the Llama family: Llama, Mistral, Qwen2, Qwen3.

It computes a flat batch of tokens from many sequences at once, decodes first, then prompt chunks; which sequence a
token belongs to is known only to rotary positions, KV slots and attention. Matrices are fused (q, k, v; gate, up), and
a layer's result joins the residual in the same operation as the next norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.model.spec import ModelSpec
from engine.model.step_inputs import StepInputs
from engine.model.weight_plan import LM_HEAD, WeightPlan, Weights
from kernels import (
    AttentionPlan,
    KVLayer,
    Operand,
    PackedWeight,
    QuantizedWeight,
    add_normed,
    add_rms_norm,
    decode_attention,
    embed_normed,
    gated,
    linear,
    normed,
    pack_weight,
    plan_attention,
    prefill_attention,
    rope_write,
    rotation,
)

ReadWeight = Callable[[str, int | None, tuple[int, ...], torch.device], Tensor | QuantizedWeight]
"""(canonical name, layer or None, shape, device) -> that tensor; the names are in `layer_shapes` and `outer_shapes`.
A matrix of a layer may come quantized: then it is kept in its own format."""


def layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of what one layer holds."""
    shapes: dict[str, tuple[int, ...]] = {"input_norm": (spec.hidden_size,), "post_norm": (spec.hidden_size,)}
    shapes.update(spec.linears())
    if spec.attention_bias:
        shapes["qkv_bias"] = (spec.qkv_size,)
    if spec.output_bias:
        shapes["o_bias"] = (spec.hidden_size,)
    if spec.mlp_bias:
        shapes["gate_up_bias"] = (2 * spec.intermediate_size,)
        shapes["down_bias"] = (spec.hidden_size,)
    if spec.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (spec.head_dim,)
    return shapes


def outer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of what the model holds outside its layers."""
    table = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embeddings": table, "final_norm": (spec.hidden_size,)}
    if not spec.tie_embeddings:
        shapes["lm_head"] = table
    return shapes


_NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
_ATTENTION_BIASES = ("qkv_bias", "o_bias")
_MLP_BIASES = ("gate_up_bias", "down_bias")
_VECTORS = _NORMS + _ATTENTION_BIASES + _MLP_BIASES


class DecoderLayer(nn.Module):
    """Attention and MLP of one layer."""

    def __init__(
        self, spec: ModelSpec, impl: str, weights: dict[str, PackedWeight], vectors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.impl = impl
        self.eps = spec.rms_norm_eps
        self.scale = spec.head_dim**-0.5
        self.qkv, self.o = weights["qkv"], weights["o"]
        self.gate_up, self.down = weights["gate_up"], weights["down"]
        for name in _VECTORS:
            self.register_buffer(name, vectors.get(name), persistent=False)
        q_norm, k_norm = vectors.get("q_norm"), vectors.get("k_norm")
        self.head_norms = None if q_norm is None or k_norm is None else (q_norm, k_norm, spec.rms_norm_eps)

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def matrices(self) -> dict[str, PackedWeight]:
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    def vectors(self) -> dict[str, Tensor]:
        return {name: held for name in _VECTORS if (held := getattr(self, name)) is not None}

    def nbytes(self, *names: str) -> int:
        return sum(held.nbytes for name in names if (held := getattr(self, name)) is not None)

    def forward(self, x: Operand, step: StepInputs, kv: KVLayer, turn: Tensor, plan: AttentionPlan | None) -> Tensor:
        """Normed hidden states [T, hidden] -> what attention adds to the residual, maybe as partials."""
        qkv = linear(x, self.qkv, self.qkv_bias, partial=True, impl=self.impl)
        q = rope_write(qkv, kv, step.slots, turn, self.head_norms, settled=True, impl=self.impl)
        return linear(self.attend(q, step, kv, plan).flatten(1), self.o, self.o_bias, partial=True, impl=self.impl)

    def attend(self, q: Tensor, step: StepInputs, kv: KVLayer, plan: AttentionPlan | None) -> Tensor:
        """q [T, heads, head_dim] against the cache -> the same shape."""
        n, scale, impl = step.num_decodes, self.scale, self.impl
        tables, lengths, starts = step.block_tables, step.lengths, step.query_starts
        if n == q.shape[0]:
            return decode_attention(q, kv, tables, lengths, scale, plan, impl=impl)
        if n == 0:
            return prefill_attention(q, kv, tables, starts, lengths, scale, plan, impl=impl)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decode_attention(q[:n], kv, tables[:n], lengths[:n], scale, plan, out=out[:n], impl=impl)
        prefill_attention(q[n:], kv, tables[n:], starts, lengths[n:], scale, plan, out=out[n:], impl=impl)
        return out

    def mlp(self, x: Operand) -> Tensor:
        """Normed hidden states [T, hidden] -> what the MLP adds to the residual, maybe as partials."""
        inner = gated(x, self.gate_up, self.gate_up_bias, self.down, impl=self.impl)
        return linear(inner, self.down, self.down_bias, partial=True, impl=self.impl)


class Decoder(nn.Module):
    """The whole model in one weight format.

    impl: as in `kernels`; "torch" is the reference and computes in float32, everything else in bfloat16.
    """

    embeddings: Tensor | None
    final_norm: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        impl: str,
        layers: Sequence[DecoderLayer],
        embeddings: Tensor | None,
        final_norm: Tensor,
        lm_head: PackedWeight,
        notes: Sequence[str] = (),
    ) -> None:
        """embeddings: [vocab, hidden], or None where tokens are looked up in the lm_head, which then keeps rows.

        notes: what the user should know of how the weights were changed in building.
        """
        super().__init__()
        self.spec, self.impl, self.notes = spec, impl, tuple(notes)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("final_norm", final_norm, persistent=False)
        self.lm_head = lm_head
        self._layers = tuple(layers)  # iterating a ModuleList costs more than a small layer's kernels on a CPU

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.float32 if self.impl == "torch" else torch.bfloat16

    def forward(self, step: StepInputs, kv: Sequence[KVLayer], cos_sin: Tensor) -> Tensor:
        """Write keys and values of every token; return the final hidden states [S, hidden] of `step.rows`."""
        impl, eps = self.impl, self.spec.rms_norm_eps
        turn = rotation(step.positions, cos_sin, impl=impl)
        tables, lengths, starts = step.block_tables, step.lengths, step.query_starts
        plan = plan_attention(kv[0], self.spec.num_heads, tables, starts, lengths, step.num_decodes, impl=impl)
        x, residual = self.embed(step.tokens)
        for i, layer in enumerate(self._layers):
            following = self._layers[i + 1] if i + 1 < len(self._layers) else None
            y = layer(x, step, kv[i], turn, plan)
            if following is None and step.num_decodes < len(residual):  # of prompts only some rows are read
                y, residual = y[..., step.rows, :], residual[step.rows]
            x, residual = add_normed(y, residual, layer.post_norm, eps, layer.gate_up, impl=impl)
            y = layer.mlp(x)
            if following is not None:
                x, residual = add_normed(y, residual, following.input_norm, eps, following.qkv, impl=impl)
        return add_rms_norm(y, residual, self.final_norm, eps, impl=impl)[0]

    def embed(self, tokens: Tensor) -> tuple[Operand, Tensor]:
        """int64 [T] -> [T, hidden], normed for the first layer and as they are."""
        first, table, eps = self._layers[0], self.embeddings, self.spec.rms_norm_eps
        if table is not None and table.dtype == self.dtype:
            return embed_normed(tokens, table, first.input_norm, eps, first.qkv, impl=self.impl)
        rows = self.lm_head.rows(tokens, self.dtype) if table is None else F.embedding(tokens, table).to(self.dtype)
        return normed(rows, first.input_norm, eps, first.qkv, impl=self.impl), rows

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden] -> [S, vocab] in the activations' dtype."""
        return linear(hidden, self.lm_head, impl=self.impl)

    def reference(self) -> Decoder:
        """The same weights, dequantized as they are used, computed in float32 by the readable implementation."""
        layers = [DecoderLayer(self.spec, "torch", layer.matrices(), layer.vectors()) for layer in self._layers]
        return Decoder(self.spec, "torch", layers, self.embeddings, self.final_norm, self.lm_head)

    def matrices(self) -> dict[str, PackedWeight]:
        """Every matrix by the name a WeightPlan gives it."""
        layers = enumerate(self._layers)
        named = {f"layers.{i}.{name}": held for i, layer in layers for name, held in layer.matrices().items()}
        return {**named, LM_HEAD: self.lm_head}

    def matrix_formats(self) -> dict[str, int]:
        """Number of the layers' matrices by format as computed: {"int4 group 128": 7, "bf16": 1}."""
        packed = [matrix for layer in self._layers for matrix in layer.matrices().values()]
        return dict(Counter(WeightPlan(m.format).label(m.group_size or 0) for m in packed))

    def weight_bytes(self) -> dict[str, int]:
        """Bytes really held, by part. On a CPU a tied lm_head counts where oneDNN needs its own layout of the table."""
        table, head = self.embeddings, self.lm_head
        tied = table is None or (head.data.layout == torch.strided and head.data.data_ptr() == table.data_ptr())
        return {
            "embeddings": head.nbytes if table is None else table.nbytes,
            "attention": sum(layer.nbytes("qkv", "o", *_ATTENTION_BIASES) for layer in self._layers),
            "mlp": sum(layer.nbytes("gate_up", "down", *_MLP_BIASES) for layer in self._layers),
            "norms": sum(layer.nbytes(*_NORMS) for layer in self._layers) + self.final_norm.nbytes,
            "lm_head": 0 if tied else head.nbytes,
        }


def build_decoder(
    spec: ModelSpec,
    read: ReadWeight,
    *,
    weights: Weights,
    group_size: int,
    device: torch.device,
    impl: str,
    kept: Mapping[str, PackedWeight] | None = None,
) -> Decoder:
    """Read, fuse, quantize and lay out the weights, one tensor at a time so that no second copy of the model exists.

    kept: matrices of an earlier decoder, by name, that are taken as they are instead of being made again.
    Raises ConfigError where a matrix cannot be stored as `weights` with `group_size`.
    """
    plan = WeightPlan.of(weights)
    kept = kept or {}
    reference = impl == "torch"
    dtype = torch.float32 if reference else torch.bfloat16
    notes: dict[str, None] = {}  # an ordered set

    def vector(name: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        tensor = read(name, layer, shape, device)
        assert isinstance(tensor, Tensor)
        return tensor.to(device=device, dtype=dtype)

    def matrix(name: str, layer: int, shape: tuple[int, ...]) -> PackedWeight:
        full = f"layers.{layer}.{name}"
        if full in kept:
            return kept[full]
        chosen = plan[full]
        tensor = read(name, layer, shape, device)
        if isinstance(tensor, QuantizedWeight):
            packed = _exact(tensor, device) if reference else pack_weight(tensor, tensor.format, device=device)
            if not _holds_scale(packed, tensor.scale):
                notes["scales rounded to bf16"] = None
            return packed
        if reference and chosen == "bf16":
            return _plain(tensor.to(device))
        try:
            return pack_weight(tensor, chosen, group_size=group_size, device=device)
        except ValueError as error:
            raise ConfigError(f"{spec.name}: {name} {list(shape)} of layer {layer} as {chosen}: {error}") from error

    layers = []
    shapes = layer_shapes(spec)
    for i in range(spec.num_layers):
        packed = {name: matrix(name, i, shape) for name, shape in shapes.items() if len(shape) == 2}
        vectors = {name: vector(name, i, shape) for name, shape in shapes.items() if len(shape) == 1}
        layers.append(DecoderLayer(spec, impl, packed, vectors))
    outer = {name: vector(name, None, shape) for name, shape in outer_shapes(spec).items()}
    table = outer.get("lm_head", outer["embeddings"])
    head_format = spec.head_format(plan)
    exact = reference and head_format == "bf16"
    lm_head = _plain(table) if exact else pack_weight(table, head_format, group_size=group_size, device=device)
    shared = spec.tie_embeddings and head_format != "bf16"
    table_or_none = None if shared else outer["embeddings"]
    return Decoder(spec, impl, layers, table_or_none, outer["final_norm"], lm_head, tuple(notes))


def _plain(weight: Tensor) -> PackedWeight:
    """float32 [N, K] as it is: the reference keeps what the checkpoint held."""
    return PackedWeight("bf16", "plain", (weight.shape[0], weight.shape[1]), weight.float())


def _exact(weight: QuantizedWeight, device: torch.device) -> PackedWeight:
    """Codes of a checkpoint with scales as the checkpoint held them, where a fast layout would round them to bf16."""
    if weight.zero is not None:
        return pack_weight(weight, weight.format, device=device, layout="planes")
    assert weight.scale is not None
    return PackedWeight(weight.format, "plain", weight.shape, weight.codes.to(device), weight.scale.to(device))


def _holds_scale(packed: PackedWeight, scale: Tensor | None) -> bool:
    """Whether a packed weight keeps these scales as they are: planes keep 16 significant bits, enough for fp16."""
    if scale is None or packed.scale is None:
        return True
    bits = 16 if packed.layout == "planes" else 24 if packed.scale.dtype == torch.float32 else 8
    mantissa, _ = torch.frexp(scale.double())
    return bool((mantissa * 2**bits == (mantissa * 2**bits).round()).all())

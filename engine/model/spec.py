"""A model's dimensions and the arithmetic that follows from them: parameters, bytes, operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError
from engine.model.kv_plan import KV, KeyBias, KVPlan, layer_names
from engine.model.weight_plan import LM_HEAD, WeightPlan, Weights
from kernels import KV_FORMATS, WEIGHT_FORMATS

HEAD_FORMAT = {"bf16": "bf16", "int8": "int8", "int4": "int8", "w8a8": "int8", "fp8": "int8", "w4a8": "int8"}
"""Format of the lm_head by weight format: its rows are whole answers, so 4 bits cost quality where they save least."""

ROW_FORMATS = ("bf16", "int8")
"""Formats of an lm_head in which tokens can be looked up, as tied embeddings are."""


@dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint quantized elsewhere stores its matrices, which are kept so: its method, the key of
    WEIGHT_FORMATS that computes them, and what to tell the user. The lm_head and embeddings are not quantized."""

    method: str
    weights: str
    group_size: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions of one decoder of the Llama family.

    rope: transformers' own `rope_parameters` dict (rope_type, rope_theta, factor, ...).
    In a quantized format the lm_head is int8 (HEAD_FORMAT) and embeddings stay bf16, unless they are tied: then one
    int8 table serves both.
    key_biases: one entry per layer where keys have a bias, read from the checkpoint; else empty.
    stored: of a checkpoint quantized elsewhere. `weights` "bf16" then means as stored, and another format is refused.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    eos_token_ids: tuple[int, ...] = ()
    key_biases: tuple[KeyBias, ...] = ()
    stored: StoredFormat | None = None

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the four fused matrices of one layer."""
        return {
            "qkv": (self.qkv_size, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    @property
    def num_parameters(self) -> int:
        per_layer = sum(n * k for n, k in self.linears().values()) + 2 * self.hidden_size
        if self.attention_bias:
            per_layer += self.qkv_size
        if self.qk_norm:
            per_layer += 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * per_layer + embeddings + self.hidden_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[N, K] of every matrix that a WeightPlan names, in the order of computation."""
        layers = range(self.num_layers)
        named = {f"layers.{i}.{name}": shape for i in layers for name, shape in self.linears().items()}
        return {**named, LM_HEAD: (self.vocab_size, self.hidden_size)}

    def head_format(self, plan: WeightPlan) -> str:
        """The lm_head's format: the one chosen, else what goes with the plan's default."""
        return plan.head or HEAD_FORMAT[plan.default]

    def check_weights(self, weights: Weights) -> None:
        """ConfigError where `weights` names a matrix that the model does not have, gives a table that is also looked
        up in a format that does not keep its rows, or asks to requantize a checkpoint that is quantized already."""
        plan = WeightPlan.of(weights)
        for name, _ in plan.named:
            if name not in self.matrices():
                raise ConfigError(f"weights names {name!r}; the layers of {self.name} are 0 to {self.num_layers - 1}")
        if self.tie_embeddings and plan.head not in (None, *ROW_FORMATS):
            raise ConfigError(
                f"weights of lm_head is {plan.head!r}; {self.name} looks its embeddings up in the same table, so it "
                f"must be one of {', '.join(ROW_FORMATS)}"
            )
        if self.stored is not None and plan.simplest not in ("bf16", self.stored.weights):
            raise ConfigError(
                f"weights is '{weights}', but {self.name} is quantized already ({self.stored.method}) and runs as "
                f"{self.stored.weights!r}; leave weights at 'bf16' to take a checkpoint as it is"
            )

    def weight_bytes(self, weights: Weights, group_size: int) -> dict[str, int]:
        """Bytes of the weights by part in format `weights`, scales and zeros counted."""
        self.check_weights(weights)
        per = self.matrix_bytes(self._computed(weights), self.stored.group_size if self.stored else group_size)
        part = {name: sum(per[f"layers.{i}.{name}"] for i in range(self.num_layers)) for name in self.linears()}
        bias = 2 * self.qkv_size if self.attention_bias else 0
        norms = 2 * (2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0))
        return {
            "embeddings": per[LM_HEAD] if self.tie_embeddings else 2 * self.vocab_size * self.hidden_size,
            "attention": part["qkv"] + part["o"] + self.num_layers * bias,
            "mlp": part["gate_up"] + part["down"],
            "norms": self.num_layers * norms + 2 * self.hidden_size,
            "lm_head": 0 if self.tie_embeddings else per[LM_HEAD],
        }

    def matrix_bytes(self, weights: Weights, group_size: int) -> dict[str, int]:
        """Bytes of each matrix that a WeightPlan names, in the plan's format, scales and zeros counted."""
        formats, shapes = self._formats(WeightPlan.of(weights)), self.matrices().items()
        return {name: WEIGHT_FORMATS[formats[name]].nbytes(n, k, group_size) for name, (n, k) in shapes}

    def operations_by_format(self, weights: Weights) -> dict[str, float]:
        """Multiply-adds times two of one token in the matrices of each format."""
        formats, found = self._formats(self._computed(weights)), dict[str, float]()
        for name, (n, k) in self.matrices().items():
            found[formats[name]] = found.get(formats[name], 0.0) + 2.0 * n * k
        return found

    def _computed(self, weights: Weights) -> WeightPlan:
        """The plan that is computed: a checkpoint quantized elsewhere has its own."""
        if self.stored is not None:
            return WeightPlan.of({"default": self.stored.weights, LM_HEAD: "bf16"})
        return WeightPlan.of(weights)

    def _formats(self, plan: WeightPlan) -> dict[str, str]:
        """The format of every matrix."""
        return {name: plan[name] for name in self.matrices()} | {LM_HEAD: self.head_format(plan)}

    def kv_formats(self, kv: KV, repair: bool) -> tuple[str, ...]:
        """The KV format of each layer; with `repair` a finer one where the key bias is too large for the one asked for.
        ConfigError where `kv` names a layer that is not there."""
        plan = KVPlan.of(kv)
        asked = plan.formats(self.num_layers)
        if not repair or not self.key_biases:
            return asked
        named = dict(plan.layers)
        return tuple(
            chosen if layer in named else bias.repaired(chosen)
            for layer, (chosen, bias) in enumerate(zip(asked, self.key_biases, strict=True))
        )

    def kv_label(self, kv: KV, repair: bool) -> str:
        """The KV formats in words: what was asked for, and which layers have another instead."""
        asked, used = KVPlan.of(kv).formats(self.num_layers), self.kv_formats(kv, repair)
        changed: dict[tuple[str, str], list[int]] = {}
        for layer, pair in enumerate(zip(asked, used, strict=True)):
            if pair[0] != pair[1]:
                changed.setdefault(pair, []).append(layer)
        if not changed:
            return str(kv)
        parts = [f"{new} instead of {old} in {layer_names(layers)}" for (old, new), layers in changed.items()]
        return f"{kv} ({', '.join(parts)}, whose key bias is too large for it; kv_repair=False keeps it)"

    def kv_bytes_per_token(self, kv: KV, repair: bool = True) -> int:
        """Bytes of keys and values per token over all layers, scales and zeros counted."""
        formats = self.kv_formats(kv, repair)
        return sum(KV_FORMATS[name].bytes_per_token(self.num_kv_heads, self.head_dim) for name in formats)

    def flops_per_token(self, context: int) -> float:
        """Multiply-adds times two for one token that attends to `context` tokens, lm_head included."""
        matmul = sum(n * k for n, k in self.linears().values()) * self.num_layers + self.vocab_size * self.hidden_size
        return 2.0 * matmul + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def workspace_bytes(self, step_tokens: int, max_batch_size: int) -> int:
        """Activations of one step at their widest (bf16 in and out of the MLP, residual, norm) and fp32 logits."""
        widest = 3 * self.intermediate_size + 4 * self.hidden_size + 2 * self.qkv_size
        return 2 * step_tokens * widest + 2 * 4 * max_batch_size * self.vocab_size

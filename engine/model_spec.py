"""A model's dimensions and the arithmetic that follows from them: parameters, bytes, operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError
from kernels import KV_FORMATS, WEIGHT_FORMATS

HEAD_FORMAT = {"bf16": "bf16", "int8": "int8", "int4": "int8"}
"""Format of the lm_head by weight format: its rows are whole answers, so 4 bits cost quality where they save least."""


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

    def check_weights(self, weights: str) -> None:
        """ConfigError where `weights` asks to requantize a checkpoint that is quantized already."""
        if self.stored is not None and weights not in ("bf16", self.stored.weights):
            own = f"{self.stored.weights!r}" if self.stored.weights != "bf16" else "'bf16' (from fp8)"
            raise ConfigError(
                f"weights is {weights!r}, but {self.name} is quantized already ({self.stored.method}) and runs as "
                f"{own}; leave weights at 'bf16' to take a checkpoint as it is"
            )

    def weight_bytes(self, weights: str, group_size: int) -> dict[str, int]:
        """Bytes of the weights by part in format `weights`, scales and zeros counted."""
        self.check_weights(weights)
        head_format = HEAD_FORMAT[weights]
        if self.stored is not None:
            weights, group_size, head_format = self.stored.weights, self.stored.group_size, "bf16"
        stored = WEIGHT_FORMATS[weights]
        per = {name: stored.nbytes(n, k, group_size) for name, (n, k) in self.linears().items()}
        bias = 2 * self.qkv_size if self.attention_bias else 0
        norms = 2 * (2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0))
        head = WEIGHT_FORMATS[head_format].nbytes(self.vocab_size, self.hidden_size, group_size)
        return {
            "embeddings": head if self.tie_embeddings else 2 * self.vocab_size * self.hidden_size,
            "attention": self.num_layers * (per["qkv"] + per["o"] + bias),
            "mlp": self.num_layers * (per["gate_up"] + per["down"]),
            "norms": self.num_layers * norms + 2 * self.hidden_size,
            "lm_head": 0 if self.tie_embeddings else head,
        }

    def kv_bytes_per_token(self, kv: str) -> int:
        """Bytes of keys and values per token over all layers, scales and zeros counted."""
        return self.num_layers * KV_FORMATS[kv].bytes_per_token(self.num_kv_heads, self.head_dim)

    def flops_per_token(self, context: int) -> float:
        """Multiply-adds times two for one token that attends to `context` tokens, lm_head included."""
        matmul = sum(n * k for n, k in self.linears().values()) * self.num_layers + self.vocab_size * self.hidden_size
        return 2.0 * matmul + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def workspace_bytes(self, max_batched_tokens: int, max_batch_size: int) -> int:
        """Activations of one step at their widest (bf16 in and out of the MLP, residual, norm) and fp32 logits."""
        widest = 3 * self.intermediate_size + 4 * self.hidden_size + 2 * self.qkv_size
        return 2 * max_batched_tokens * widest + 2 * 4 * max_batch_size * self.vocab_size

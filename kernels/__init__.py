"""Quantized inference kernels: pure functions on tensors. PyTorch and Triton only; nothing here knows of requests.

Every operation takes `impl`: "torch" (readable oracle), "aten" (CPU), "triton" (CUDA) or "auto". See `dispatch`.
"""

from .formats.packed import PackedWeight
from .formats.packing import pack_weight, random_weight
from .formats.weights import WEIGHT_FORMATS, QuantizedWeight, WeightFormat, quantize_weight
from .paged.attention import AttentionPlan, decode_attention, plan_attention, prefill_attention
from .paged.expansion import most_expanded_bytes
from .paged.kv_access import read_kv, write_kv
from .paged.kv_cache import KV_FORMATS, KVFormat, KVLayer, allocate_kv
from .paged.qkv import rope_write
from .products.gated import gated_linear
from .products.matmul import linear
from .products.operands import add_normed, embed_normed, gated, normed
from .rows.activations import Operand
from .rows.elementwise import add_rms_norm, embed_rms_norm, rms_norm, rope, rotation, silu_mul
from .rows.tokens import feed_tokens, highest

__all__ = [
    "AttentionPlan",
    "KV_FORMATS",
    "KVFormat",
    "KVLayer",
    "Operand",
    "PackedWeight",
    "QuantizedWeight",
    "WEIGHT_FORMATS",
    "WeightFormat",
    "add_normed",
    "add_rms_norm",
    "allocate_kv",
    "decode_attention",
    "embed_normed",
    "embed_rms_norm",
    "feed_tokens",
    "gated",
    "gated_linear",
    "highest",
    "linear",
    "most_expanded_bytes",
    "normed",
    "pack_weight",
    "plan_attention",
    "prefill_attention",
    "quantize_weight",
    "random_weight",
    "read_kv",
    "rms_norm",
    "rope",
    "rope_write",
    "rotation",
    "silu_mul",
    "write_kv",
]

"""When prefill attention expands the quantized blocks of a batch to bf16 first, and the memory that this takes."""

from __future__ import annotations

from .kv_cache import KVLayer, kv_format

EXPAND_ROWS = 128  # new tokens per sequence from which expanding the blocks first is faster
EXPAND_BYTES = 256 << 20  # and the largest workspace it may take


def worth_expanding(rows: int, batch: int, width: int, layer: KVLayer) -> bool:
    """Whether a quantized cache is better expanded to bf16 once than decoded by every tile of queries. rows: new tokens
    of `batch` sequences whose block tables are `width` wide."""
    workspace = batch * width * block_bytes(layer.block_size, layer.kv_heads, layer.head_dim)
    return layer.key_scale is not None and rows >= EXPAND_ROWS * batch and workspace <= EXPAND_BYTES


def block_bytes(block_size: int, kv_heads: int, head_dim: int) -> int:
    """Keys and values of one block in bf16."""
    return 4 * block_size * kv_heads * head_dim


def most_expanded_bytes(format: str, rows: int, width: int, block_size: int, kv_heads: int, head_dim: int) -> int:
    """Bytes that no expansion exceeds in a step of up to `rows` new tokens whose block tables are up to `width` wide,
    the int32 tables of the expanded blocks included; 0 for bf16. Layers are computed one by one: one counts."""
    if not kv_format(format).key.scale_bytes:
        return 0
    each = block_bytes(block_size, kv_heads, head_dim)
    return min(rows // EXPAND_ROWS * width, EXPAND_BYTES // each) * (each + 4)

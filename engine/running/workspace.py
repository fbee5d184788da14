"""What a step takes beside weights and KV, as an upper estimate before the run, and what the engine may take in all."""

from __future__ import annotations

import psutil
import torch

from engine.config import EngineConfig
from engine.model.spec import ModelSpec
from engine.running.device import resolve_device
from engine.running.graphs import padded_size
from engine.running.prompt_graphs import MOST_TOKENS
from engine.running.sampler import sampling_bytes, sorting_bytes
from kernels import most_expanded_bytes

CPU_POOL = 1 << 30
"""Most bytes that the engine takes for KV and reserve on a CPU when no limit is given."""
CUDA_BLOCK_SIZE, CPU_BLOCK_SIZE = 64, 16
"""Tokens of a KV block where the configuration does not say."""
CUDA_SCRATCH = 160 << 20
"""What libraries and kernels take on a GPU for themselves: cuBLAS 32 MB per stream on Hopper, 32 MB for the slice of a
quantized matrix that a long prompt is multiplied with, as bf16 and as int8 each, partial sums of split matrices (up to
36 MB for a 7B, by the rules and the tuned tiles) and of attention (up to 6 MB)."""
PROMPT_ROWS = 256
"""Rows of logits held at once when prompt log-probabilities are asked for: 256 x 150,000 float32 are 150 MB."""


def default_limit(device: torch.device, weights: int, workspace: int) -> int:
    """Bytes the engine may use when nobody says: what the GPU has free now (weights counted as ours), or on a CPU the
    weights, the workspace, and at most 1 GiB more or half of the RAM that is available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free + weights
    return weights + workspace + min(CPU_POOL, psutil.virtual_memory().available // 2)


def workspace_bytes(spec: ModelSpec, config: EngineConfig, itemsize: int) -> int:
    """Upper estimate of what the engine allocates on its device beside weights and KV; itemsize: of activations."""
    return sum(workspace_parts(spec, config, itemsize, resolve_device(config.device)).values())


def workspace_parts(spec: ModelSpec, config: EngineConfig, itemsize: int, device: torch.device) -> dict[str, int]:
    """`workspace_bytes` by part.

    activations: of the tokens of a step. logits: of the rows that are sampled, and what sampling makes of them.
    On a GPU besides: "transient", the larger of what prefill attention expands and what sampling sorts, which never
    meet; "graphs", what captured steps keep for themselves; "positions", the rotary table; "libraries".
    """
    logits = max(
        sampling_bytes(config.max_batch_size, spec.vocab_size, itemsize),
        PROMPT_ROWS * spec.vocab_size * (itemsize + 2 * 4),  # prompts are scored in float32
    )
    parts = {"activations": step_tokens(spec, config) * _token_bytes(spec, itemsize), "logits": logits}
    if device.type != "cuda":
        return parts
    fast = config.impl != "torch"
    sorting = sorting_bytes(config.max_batch_size, spec.vocab_size)
    return {
        **parts,
        "transient": max(_expanded_bytes(spec, config) if fast else 0, sorting),
        "graphs": _graph_bytes(spec, config, itemsize) if fast and config.graphs else 0,
        "positions": 4 * spec.head_dim * _session(spec, config),
        "libraries": CUDA_SCRATCH,
    }


def prompt_tokens(spec: ModelSpec, config: EngineConfig) -> int:
    """Most prompt tokens of one step: the budget, but without chunked prefill a prompt is computed whole, however
    long."""
    return max(config.max_batched_tokens, 0 if config.chunked_prefill else _session(spec, config))


def step_tokens(spec: ModelSpec, config: EngineConfig) -> int:
    """Most tokens of one step: requests that decode ride along with the prompts."""
    return prompt_tokens(spec, config) + config.max_batch_size


def _session(spec: ModelSpec, config: EngineConfig) -> int:
    """Most tokens of a request, as far as is known before the pool is: it may hold fewer."""
    return config.session_len or spec.max_positions


def _token_bytes(spec: ModelSpec, itemsize: int) -> int:
    """Activations of a token that are alive at once in a layer: the residual and two hidden states, q, k and v before
    and after rotation, gate_up and its product."""
    return itemsize * (4 * spec.hidden_size + 2 * spec.qkv_size + 3 * spec.intermediate_size)


def _expanded_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """What prefill attention takes to expand one layer's blocks, in the format that takes most."""
    block_size = config.block_size or CUDA_BLOCK_SIZE
    width = -(-_session(spec, config) // block_size)
    sizes = step_tokens(spec, config), width, block_size, spec.num_kv_heads, spec.head_dim
    return max(most_expanded_bytes(name, *sizes) for name in set(spec.kv_formats(config.kv, config.kv_repair)))


def _graph_bytes(spec: ModelSpec, config: EngineConfig, itemsize: int) -> int:
    """Captured steps share memory of their own among one kind, as large as the largest of them needs: a padded batch of
    decodes with its logits, and a copy of these where they are kept, and a prompt."""
    batch = padded_size(config.max_batch_size)
    return (batch + MOST_TOKENS) * _token_bytes(spec, itemsize) + 2 * batch * spec.vocab_size * itemsize

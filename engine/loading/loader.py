"""From a model's name to something that runs: `load_model` finds, checks and reads; `LoadedModel` builds decoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.loading.checkpoint import CheckpointWeights, read_spec
from engine.loading.key_bias import key_biases
from engine.loading.shapes import SyntheticWeights, synthetic_spec
from engine.model.decoder import Decoder, build_decoder
from engine.model.spec import ModelSpec
from engine.model.tokenizer import ByteTokenizer, PretrainedTokenizer, Tokenizer
from engine.model.weight_plan import LM_HEAD, WeightPlan, Weights
from kernels import WEIGHT_FORMATS, PackedWeight, QuantizedWeight

SYNTHETIC = "synthetic:"
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt")


class WeightSource(Protocol):
    """Gives any weight at high precision, or as the checkpoint quantized it, as often as a decoder is built."""

    def __call__(
        self, name: str, layer: int | None, shape: tuple[int, ...], device: torch.device
    ) -> Tensor | QuantizedWeight: ...

    @property
    def nbytes(self) -> int:
        """Host memory held between builds."""
        ...

    def close(self) -> None: ...


class LoadedModel:
    """A model that is read and checked. Decoders come from it in any weight format; the one built last is kept.

    Engines may share it: an engine that was given a LoadedModel leaves it open. `close` may be called twice.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, weights: WeightSource | None, source: str) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.source = source
        self._weights = weights
        self._built: tuple[tuple[object, ...], Decoder] | None = None

    @property
    def is_synthetic(self) -> bool:
        """Random weights: speed and memory are real, text and quality are not."""
        return self.source.startswith(SYNTHETIC)

    @property
    def host_bytes(self) -> int:
        """Host memory of the weights kept at high precision."""
        return 0 if self._weights is None else self._weights.nbytes

    @property
    def weights(self) -> WeightSource:
        """What decoders are built from. ConfigError where a model was loaded for simulation, or is closed."""
        if self._weights is None:
            raise ConfigError(f"model {self.source!r} was loaded for simulation, or is closed: it has no weights")
        return self._weights

    def decoder(self, *, weights: Weights, group_size: int, device: torch.device, impl: str) -> Decoder:
        """The decoder in that format, built anew unless it was built last. ConfigError where it cannot be built.

        Layers' matrices whose format does not change are taken over from the decoder built last.
        A checkpoint quantized elsewhere has one format, its own: `weights` is "bf16" or names that one.
        """
        self.spec.check_weights(weights)
        if self.spec.stored is not None:
            weights = "bf16"  # of what the checkpoint left unquantized
        plan = WeightPlan.of(weights)
        grouped = any(WEIGHT_FORMATS[name].grouped for name in plan.formats)
        key = (plan, group_size if grouped else None, device, impl)
        if self._built is not None and self._built[0] == key:
            return self._built[1]
        if self._weights is None:
            raise ConfigError(f"model {self.source!r} was loaded for simulation, or is closed: it has no weights")
        kept = self._unchanged(plan, group_size, device, impl)
        self.release()
        built = build_decoder(
            self.spec, self._weights, weights=plan, group_size=group_size, device=device, impl=impl, kept=kept
        )
        self._built = (key, built)
        return built

    def _unchanged(self, plan: WeightPlan, group_size: int, device: torch.device, impl: str) -> dict[str, PackedWeight]:
        """The layers' matrices of the decoder built last that `plan` leaves as they are."""
        if self._built is None or self._built[0][2:] != (device, impl):
            return {}

        def same(name: str, held: PackedWeight) -> bool:
            regrouped = WEIGHT_FORMATS[held.format].grouped and held.group_size != group_size
            return name != LM_HEAD and held.format == plan[name] and not regrouped

        return {name: held for name, held in self._built[1].matrices().items() if same(name, held)}

    def release(self) -> None:
        """Forget the decoder built last; its memory returns when its last user lets go."""
        self._built = None

    def close(self) -> None:
        self.release()
        if self._weights is not None:
            self._weights.close()
        self._weights = None

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_model(config: EngineConfig) -> LoadedModel:
    """Find and check `config.model`; with `config.runner == "simulated"` no weights are read.

    ConfigError for an unknown shape or a name that leads nowhere, CheckpointError for a folder that cannot be used.
    """
    simulated = config.runner == "simulated"
    if config.model.startswith(SYNTHETIC):
        spec = synthetic_spec(config.model.removeprefix(SYNTHETIC))
        spec.check_weights(config.weights)
        spec.kv_formats(config.kv, config.kv_repair)
        weights = None if simulated else SyntheticWeights(spec, config.seed)
        return LoadedModel(spec, ByteTokenizer(spec.vocab_size), weights, config.model)
    folder, source = _find(config.model)
    spec = read_spec(folder)
    spec.check_weights(config.weights)
    spec = replace(spec, key_biases=key_biases(folder, spec))
    spec.kv_formats(config.kv, config.kv_repair)  # refuses layers that are not there, before anything large is read
    if config.session_len is not None and spec.sliding_window is not None and config.session_len > spec.sliding_window:
        raise ConfigError(
            f"session_len is {config.session_len}; {source} attends within a sliding window, which is supported for "
            f"sessions that fit into it: at most {spec.sliding_window} tokens"
        )
    tokenizer = PretrainedTokenizer(folder, spec.eos_token_ids)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, vocab_size is {spec.vocab_size:,}"
        )
    return LoadedModel(spec, tokenizer, None if simulated else CheckpointWeights(folder, spec), source)


def _find(model: str) -> tuple[Path, str]:
    """The folder of a model, and how to name it: "bundled", a path, or a hub id."""
    if model == "bundled":
        from engine.bundled import MODEL_DIR

        return MODEL_DIR, "bundled"
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, str(folder)
    if folder.exists():
        raise CheckpointError(f"model is {model!r}, a file; give the folder that holds config.json and the safetensors")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(
            f"model is {model!r}; it must be 'bundled', 'synthetic:<shape>', a folder that exists, or a hub id "
            "'owner/name'"
        )
    return _download(model)


def _download(repo: str) -> tuple[Path, str]:
    """A hub snapshot: weights, config and tokenizer. Without a connection the copy in the cache is used, and said."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    patterns = list(HUB_PATTERNS)
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns)), repo
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ConfigError(f"model is {repo!r}; the hub has no such model, and there is no such folder") from error
    except Exception as error:  # whatever the transport raises; the cache may still serve
        reason = f"{type(error).__name__}"
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
    except Exception as error:
        raise ConfigError(f"model is {repo!r}; the hub cannot be reached ({reason}), no copy is here") from error
    return folder, f"{repo} (the hub could not be reached: local copy)"

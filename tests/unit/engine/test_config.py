"""The knobs refuse what is out of range, in words, and LMDeploy's names are understood."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.unit.engine.simulated import build


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_ratio": -0.5}, "cache_ratio is -0.5"),
        ({"cache_ratio": float("nan")}, "cache_ratio is nan"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"weights": "int3"}, "weights is 'int3'; it must be one of bf16"),
        ({"kv": "int5"}, "kv is 'int5'"),
        ({"batching": "magic"}, "must be one of static, dynamic, continuous"),
        ({"gpu": "abacus"}, "gpu is 'abacus'; it must be one of h200"),
        ({"group_size": 100}, "group_size is 100"),
        ({"block_size": 7}, "block_size is 7"),
        ({"batch_window": -1.0}, "batch_window is -1.0 s"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": np.int64(3)}, "seed is .*3.*; it must be a whole number"),
    ],
)
def test_bad_configuration_names_value_and_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="cache_fraction"):
        EngineConfig(cache_fraction=0.5)  # type: ignore[call-arg]


def test_lmdeploy_names_are_understood() -> None:
    config = EngineConfig.from_lmdeploy(
        "bundled", cache_max_entry_count=0.5, quant_policy=8, enable_prefix_caching=False, session_len=128
    )
    assert (config.cache_ratio, config.kv, config.prefix_caching, config.session_len) == (0.5, "int8", False, 128)
    with pytest.raises(ConfigError, match="quant_policy is 5"):
        EngineConfig.from_lmdeploy("bundled", quant_policy=5)
    with pytest.raises(ConfigError, match="unknown LMDeploy option 'enable_prefix_optimization'"):
        EngineConfig.from_lmdeploy("bundled", enable_prefix_optimization=True)

"""Errors a person can act on: one sentence that names the value and the permitted range."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration value is outside its range, or the configuration cannot be met on this device."""


class CheckpointError(ValueError):
    """A model folder is missing a file, is damaged, or does not match its own config."""


class RequestError(ValueError):
    """A request cannot be served by this engine; the engine itself keeps serving the others."""


class NonFiniteLogitsError(RequestError):
    """The model answered with NaN or infinity for `request_ids`; the rest of the batch can go on without them."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        self.request_ids = tuple(request_ids)
        super().__init__(f"the logits of request {', '.join(self.request_ids)} are not finite: no token can be chosen")

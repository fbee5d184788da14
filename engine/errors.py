"""Errors a person can act on: one sentence that names the value and the permitted range."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration value is outside its range, or the configuration cannot be met on this device."""


class CheckpointError(ValueError):
    """A model folder is missing a file, is damaged, or does not match its own config."""


class RequestError(ValueError):
    """A request cannot be served by this engine; the engine itself keeps serving the others."""

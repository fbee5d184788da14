"""Weights: their formats, how codes are chosen, and how they lie in memory."""

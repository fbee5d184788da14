"""Which matrices pay for a coarser format, and what a budget is best spent on; `python -m workbench.sensitivity`."""

from workbench.sensitivity.losses import FORMATS, PlannedWeights, Sensitivity, measure

__all__ = ["FORMATS", "PlannedWeights", "Sensitivity", "measure"]

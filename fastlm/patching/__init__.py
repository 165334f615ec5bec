"""fastlm's layers in the place of a model's own: patch(), unpatch(), and what fastlm.hf stands on."""

from fastlm.patching._layers import LayerNorm
from fastlm.patching._obstacles import obstacle
from fastlm.patching._patch import patch, unpatch
from fastlm.patching._report import Entry, Report
from fastlm.patching._swap import ENABLED, STATE, derive, restore, swap, swapped

__all__ = [
    "ENABLED", "STATE", "Entry", "LayerNorm", "Report", "derive", "obstacle", "patch", "restore", "swap", "swapped",
    "unpatch",
]  # fmt: skip

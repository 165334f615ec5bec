"""fastlm: fused kernels for training language models, and the layers, optimizers, models and trainer built from them.

Importing it needs torch and numpy alone; `fastlm.train` and the command line import what they need themselves.
"""

from fastlm import nn, ops, optim
from fastlm._dispatch import UnsupportedError, use_backend
from fastlm._malloc import tune_malloc
from fastlm._version import __version__
from fastlm.native import release_workspace
from fastlm.patching import patch, unpatch

__all__ = [
    "UnsupportedError", "__version__", "nn", "ops", "optim", "patch", "release_workspace", "tune_malloc", "unpatch",
    "use_backend",
]  # fmt: skip

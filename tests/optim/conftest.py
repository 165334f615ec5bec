"""Optimizers run where the ops do: tests/ops/conftest.py."""

from tests.ops.conftest import device, pytest_collection_modifyitems

__all__ = ["device", "pytest_collection_modifyitems"]

"""Tests of launchers and of the emulation itself: collected in python -m tests.emulation alone."""

from __future__ import annotations

from tests import emulation

collect_ignore_glob = [] if emulation.INSTALLED else ["test_*.py"]

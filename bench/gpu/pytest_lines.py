"""A pytest plugin: one JSON line for each test that ended, so that a run cut short still tells what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", help="file that gets a JSON line for each test")


class Lines:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            found = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                found["why"] = report.longreprtext[-1500:]
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--lines")
    if path and not hasattr(config, "workerinput"):  # with pytest-xdist the one process that hears of every test
        config.pluginmanager.register(Lines(Path(path)))

"""A pytest plugin: of all tests, those of one of several processes (SHARD="2/8"); why one fails."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["SHARD"].split("/"))
    others = [item for place, item in enumerate(items) if place % count != index]
    items[:] = items[index::count]
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """At once: a process that is cut never comes to its summary."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)

"""What every test run of this workspace shares: GPU tests, PARITY_STRICT, and the count of conformance tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

STRICT = os.environ.get("PARITY_STRICT", "") not in ("", "0")
RAN = pytest.StashKey[Counter[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RAN] = Counter()
    config.pluginmanager.register(Counting(config.stash[RAN]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("this machine has no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return refuse_skip((yield))


class Counting:
    """Reports reach the process that prints the summary, wherever the tests ran; keywords hold their markers."""

    def __init__(self, ran: Counter[tuple[str, str]]) -> None:
        self.ran = ran

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped and (package := package_of(report.nodeid)):
            self.ran[package, "conformance" if "conformance" in report.keywords else "other"] += 1


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return refuse_skip((yield))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each package that was tested, so that a family without conformance tests shows a zero."""
    ran = config.stash[RAN]
    for package in sorted({package for package, _ in ran}):
        terminalreporter.write_line(f"conformance: {package} ran {ran[package, 'conformance']} tests")


def refuse_skip(report: Any) -> Any:
    """Under PARITY_STRICT a test that could not be run is a test that failed; an expected failure is neither."""
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"PARITY_STRICT=1 allows no skip: {reason}"
    return report


def package_of(nodeid: str) -> str | None:
    """
    >>> package_of("packages/fastvideo-vae-wan/tests/test_conformance.py::TestWan::test_shapes")
    'fastvideo-vae-wan'
    """
    directories = nodeid.split("::")[0].split("/")
    if directories[0] == "packages":
        return directories[1]
    return directories[0] if directories[0] == "fastvideo-vae-core" else None

"""A command line whose pipeline is a stand-in that records what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

import featherweight
from featherweight.cli import group
from featherweight.core import Budget, Interval, Measurement, Note, Plan, Report


def _report(*, answer: str = "yes", outcome: str = "met") -> Report:
    baseline = Measurement(1000, "accuracy", 0.9, 0.0, n_samples=100)
    result = Measurement(300, "accuracy", 0.89, 0.01, Interval(0.0, 0.02), 0.4, 100)
    notes = (Note("node", "left alone: custom operator"),)
    budget = Budget(max_size_bytes=400)
    return Report(budget, answer, outcome, "as asked", Plan(()), baseline, result, notes=notes)


@dataclass
class StandIn:
    """`asked` is (function, positional, keywords) of the last call; `answer` what it returns or raises."""

    answer: Any = field(default_factory=_report)
    asked: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None

    def function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked = (name, args, kwargs)
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return call


@pytest.fixture
def made_report() -> Callable[..., Report]:
    return _report


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative run folders land in a temporary one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for home, names in (
        ("pipeline", ("compress", "decide", "frontier", "compare", "apply")),
        ("inspection", ("inspect",)),
    ):
        module = ModuleType(f"featherweight.{home}")
        for name in names:
            setattr(module, name, stand_in.function(name))
        monkeypatch.setitem(sys.modules, f"featherweight.{home}", module)
        monkeypatch.setattr(featherweight, home, module, raising=False)
    return stand_in


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(group, list(arguments), prog_name="featherweight")

    return invoke

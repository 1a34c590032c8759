"""report.json: written whole, read back equal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from featherweight.core import Report
from featherweight.errors import OutputError, PlanError
from featherweight.report import json as report_json


def test_report_reads_back_equal(report: Report, tmp_path: Path) -> None:
    report_json.write(report, tmp_path / "report.json")
    assert report_json.read(tmp_path / "report.json") == report


def test_document_says_what_it_is_and_what_was_derived(report: Report) -> None:
    raw = json.loads(report_json.to_json(report))
    assert (raw["schema"], raw["kind"], raw["ok"]) == (1, "report", True)
    assert raw["size_ratio"] == pytest.approx(4_740_000 / 18_600_000)
    assert raw["violations"] == []
    assert raw["result"]["drop_interval"] == {"low": -0.006, "high": 0.01, "level": 0.95}


def test_not_finite_and_numpy_values_become_plain(report: Report) -> None:
    facts = {"a": np.float32(0.5), "b": np.arange(3), "c": math.nan, "d": Path("x") / "y", "e": {3, 1}}
    raw = json.loads(report_json.to_json(dataclasses.replace(report, facts=facts)))
    assert raw["facts"] == {"a": 0.5, "b": [0, 1, 2], "c": None, "d": str(Path("x") / "y"), "e": [1, 3]}


def test_value_without_json_form_is_an_error_not_a_repr(report: Report) -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        report_json.to_json(dataclasses.replace(report, facts={"x": object()}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "kind 'report' and schema 1, but got 'list'"),
        ('{"schema": 9, "kind": "report"}', "but got ('report', 9)"),
        ('{"schema": 1, "kind": "report"}', "malformed: KeyError 'budget'"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_malformed_report_is_a_clear_error(text: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        report_json.from_json(text)
    assert says in str(caught.value)


def test_failed_write_keeps_the_old_file_and_leaves_nothing(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        report_json.write(report, target)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "old"

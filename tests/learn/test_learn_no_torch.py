"""Without torch: distillation says which extra to install, before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import featherweight as fw
from featherweight.errors import MissingExtraError


def test_distill_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    with pytest.raises(MissingExtraError, match=r"featherweight\[learn\]"):
        fw.distill("teacher.onnx", "student.onnx", None, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

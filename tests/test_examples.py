"""Every example runs as a newcomer would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "toy.py": "model.onnx",
    "inspect_model.py": "4 bits: at least",
    "compress_npz.py": "replayed from its plan: the same bytes",
    "torch_to_int4.py": "taught: taught/model.onnx accuracy",
    "korean_sentiment.py": "student, distilled ",
}


def test_every_example_is_run() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    if "torch" in (EXAMPLES / name).read_text(encoding="utf-8"):
        pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout

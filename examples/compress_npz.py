"""Make a model at least four times smaller and prove it: `python examples/compress_npz.py [MODEL DATA.npz]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import toy

import featherweight as fw


def main() -> int:
    """Compress within two limits, print what was measured, then make the same file again from its plan."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else toy.write(folder)
        report = fw.compress(model, data, max_size="25%", max_drop="2%", out=folder / "run")

        before, after = report.baseline, report.result
        print(f"{report.outcome}: {report.reason}")
        print(f"{before.size_bytes:,} -> {after.size_bytes:,} bytes ({report.size_ratio:.0%})")
        print(f"{after.metric_name} {before.metric:.3f} -> {after.metric:.3f} on {after.n_samples} unseen samples")
        for decision in report.plan.changed():
            print(f"  {decision.site}: {decision}")

        if report.ok:
            fw.apply(model, folder / "run" / "plan.json", out=folder / "again.onnx")
            same = (folder / "again.onnx").read_bytes() == (folder / "run" / "model.onnx").read_bytes()
            print(f"replayed from its plan: {'the same bytes' if same else 'DIFFERENT BYTES'}")
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())

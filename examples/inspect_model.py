"""See where a model's bytes and operations are: `python examples/inspect_model.py [MODEL]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import toy

import featherweight as fw


def main() -> None:
    """Print the largest tensors, the multiplications a call, and what each bit width would leave."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else toy.write(Path(folder))[0]
        found = fw.inspect(model)
    print(f"{found.model}: {found.file_bytes:,} bytes")
    for tensor in sorted(found.tensors, key=lambda t: t.size_bytes, reverse=True)[:5]:
        print(f"{tensor.size_bytes:>12,} B  {tensor.name} {tensor.shape} {tensor.role}")
    for floor in found.bit_floors:
        print(f"{floor.bits} bits: at least {floor.total_bytes:,} bytes")


if __name__ == "__main__":
    main()

"""Write docs/techniques.md from the technique files. A test holds that it is current."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from featherweight.techniques import all_techniques

HEAD = """# Techniques

<!-- Written by docs/make_techniques.py from the docstrings; change those. -->

A technique is one file in `src/featherweight/techniques/`. `--techniques a,b` limits a run to some of them; by default
all compete, site by site, and the budget decides. They are applied in the order of their stages: structure, recover,
numeric.
"""


def render() -> str:
    """The text of docs/techniques.md."""
    parts = [HEAD]
    for name, technique in all_techniques().items():
        module = sys.modules[type(technique).__module__]
        first, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n")
        computes = "computes in integers" if technique.integer else "computes in float"
        parts.append(
            f"## {name}\n\nStage: {technique.stage}; {computes}.\n\n{first}\n"
            + (f"\n{rest.strip()}\n" if rest.strip() else "")
        )
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "techniques.md").write_text(render(), encoding="utf-8")

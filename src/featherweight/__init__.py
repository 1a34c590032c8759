"""featherweight: model in, budget in, the smallest model that meets it out, with the proof.

    import featherweight as fw
    report = fw.compress("model.onnx", "val.npz", max_size="25%", out="run")
    print(report.outcome, report.result.size_bytes)

Names are loaded on first use, so that importing the package stays cheap and needs no extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight import words
    from featherweight.core import (
        Action,
        Attempt,
        Budget,
        Decision,
        Effect,
        Interval,
        Measurement,
        Note,
        Plan,
        Profile,
        Progress,
        Report,
        Silent,
        Site,
    )
    from featherweight.edge.asking import Asked, place
    from featherweight.edge.client import Offload
    from featherweight.edge.split import Split, split
    from featherweight.errors import (
        BudgetError,
        ChildCrashed,
        DataError,
        FeatherweightError,
        MissingExtraError,
        ModelError,
        OutputError,
        PlanError,
        RemoteError,
        RunError,
        TechniqueError,
    )
    from featherweight.inspection import Inspection, inspect
    from featherweight.learn.result import Distilled
    from featherweight.pipeline import Comparison, apply, compare, compress, decide, distill, frontier

__version__ = "0.1.0"

_HOMES = {
    "core": (
        "Action Attempt Budget Decision Effect Interval Measurement Note Plan Profile Progress Report Silent Site"
    ),
    "edge.asking": "Asked place",
    "edge.split": "Split split",
    "edge.client": "Offload",
    "errors": (
        "BudgetError ChildCrashed DataError FeatherweightError MissingExtraError ModelError OutputError PlanError"
        " RemoteError RunError TechniqueError"
    ),
    "inspection": "Inspection inspect",
    "learn.result": "Distilled",
    "pipeline": "Comparison apply compare compress decide distill frontier",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Action",
    "Asked",
    "Attempt",
    "Budget",
    "BudgetError",
    "ChildCrashed",
    "Comparison",
    "DataError",
    "Decision",
    "Distilled",
    "Effect",
    "FeatherweightError",
    "Inspection",
    "Interval",
    "Measurement",
    "MissingExtraError",
    "ModelError",
    "Note",
    "Offload",
    "OutputError",
    "Plan",
    "PlanError",
    "Profile",
    "Progress",
    "RemoteError",
    "Report",
    "RunError",
    "Silent",
    "Site",
    "Split",
    "TechniqueError",
    "apply",
    "compare",
    "compress",
    "decide",
    "distill",
    "frontier",
    "inspect",
    "place",
    "split",
    "words",
]


def __getattr__(name: str) -> Any:
    if name == "words":
        return importlib.import_module("featherweight.words")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'featherweight' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featherweight.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, "words"})

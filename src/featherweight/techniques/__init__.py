"""The techniques, one file each, found by name.

A technique is a module `techniques/<name>.py` without a leading underscore that ends with `TECHNIQUE = Class()`,
or an installed entry point in the group `featherweight.techniques`. A file that cannot be imported, or whose
`name` is not its file name, is an error: a broken technique is never silently absent.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from types import ModuleType

from featherweight.core import STAGES
from featherweight.errors import TechniqueError
from featherweight.techniques._plain import quantize_model
from featherweight.techniques._protocol import Context, Estimate, Technique, integer_names

ENTRY_POINT_GROUP = "featherweight.techniques"

__all__ = [
    "ENTRY_POINT_GROUP",
    "Context",
    "Estimate",
    "Technique",
    "all_techniques",
    "get",
    "integer_names",
    "quantize_model",
]


def checked(module: ModuleType, name: str) -> Technique:
    """The TECHNIQUE of `module`. Raises TechniqueError if it is missing, unnamed, misnamed or incomplete."""
    technique = getattr(module, "TECHNIQUE", None)
    if technique is None:
        raise TechniqueError(f"technique file {module.__name__!r} must end with TECHNIQUE = Class(), but has none")
    if not isinstance(technique, Technique):
        wanted = ("name", "stage", "integer", "sites", "options", "estimate", "apply", "finish")
        lacks = [m for m in wanted if not hasattr(technique, m)]
        raise TechniqueError(f"technique {module.__name__!r} must follow the protocol, but it lacks {lacks}")
    if technique.name != name:
        raise TechniqueError(
            f"a technique's name must be its file or entry point name {name!r}, but got {technique.name!r}"
        )
    if technique.stage not in STAGES:
        raise TechniqueError(f"the stage of {name!r} must be one of {STAGES}, but got {technique.stage!r}")
    return technique


@functools.cache
def all_techniques() -> dict[str, Technique]:
    """Every technique by name, sorted by stage, then name.

    Raises:
        TechniqueError: a file breaks the protocol or two techniques share a name.
        ImportError: a technique file cannot be imported; never caught here.
    """
    found: dict[str, Technique] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            found[info.name] = checked(importlib.import_module(f"{__name__}.{info.name}"), info.name)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found:
            raise TechniqueError(
                f"a technique name must be unique, but {point.name!r} is also {point.value!r}; rename it"
            )
        found[point.name] = checked(point.load(), point.name)
    return dict(sorted(found.items(), key=lambda item: (STAGES.index(item[1].stage), item[0])))


def get(name: str) -> Technique:
    """The technique called `name`. Raises TechniqueError listing near names."""
    table = all_techniques()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known techniques: {', '.join(table)}"
        raise TechniqueError(f"there is no technique called {name!r}; {hint}")
    return table[name]

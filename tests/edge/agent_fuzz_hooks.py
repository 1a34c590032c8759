"""Hooks of schemathesis: half of its requests name files that are there, so that jobs run and files are found."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import schemathesis

KNOWN = tuple(os.environ.get("AGENT_FUZZ_FILES", "").split(","))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Deterministic in the case: an even sum of its bytes changes it."""
    chosen = sum(repr((case.path_parameters, case.body))[:500].encode("utf-8", "replace")) % 2 == 0
    if not chosen or not KNOWN[0]:
        return
    if case.method.upper() == "PUT" and isinstance(case.body, bytes):
        case.path_parameters["sha256"] = hashlib.sha256(case.body).hexdigest()
    elif case.method.upper() in ("GET", "HEAD") and "sha256" in (case.path_parameters or {}):
        case.path_parameters["sha256"] = KNOWN[0]
    elif isinstance(case.body, dict):
        for field, known in (("model", 0), ("original", 0), ("candidate", 0)):
            if isinstance(case.body.get(field), dict):
                case.body[field] = {"file": KNOWN[known]}
        if isinstance(case.body.get("feeds"), list):
            case.body["feeds"] = [KNOWN[1]]

"""The packages that conversion needs, imported when a conversion begins."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from featherweight.errors import MissingExtraError


def need_torch(what: str) -> None:
    """Raise MissingExtraError, with the command that installs it, where torch or onnxscript is absent."""
    _need(what, "torch", ("torch", "onnxscript"))


def need_transformers(what: str) -> None:
    """The same for what reads a Hugging Face folder; imports nothing."""
    _need(what, "huggingface", ("torch", "onnxscript", "transformers", "safetensors"))


def transformers(what: str) -> Any:
    """The package transformers, set to stay off the network. Raises MissingExtraError."""
    need_transformers(what)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return importlib.import_module("transformers")


def _need(what: str, extra: str, packages: tuple[str, ...]) -> None:
    absent = [p for p in packages if not _installed(p)]
    if absent:
        raise MissingExtraError(
            f"{what} needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed; "
            f"run: pip install 'featherweight[{extra}]'"
        )


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False

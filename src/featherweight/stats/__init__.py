"""Calibration statistics: one streaming pass, memory flat in the number of batches."""

from __future__ import annotations

from featherweight.stats.statistics import MomentStats, Statistics, ValueStats
from featherweight.stats.streaming import collect, model_key

__all__ = ["MomentStats", "Statistics", "ValueStats", "collect", "model_key"]

"""Calibration statistics: one streaming pass, memory flat in the number of batches."""

from __future__ import annotations

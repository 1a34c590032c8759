"""featherweight: model in, budget in, the smallest model that meets it out, with the proof."""

from __future__ import annotations

"""Reports for people and programs: terminal text, JSON, one-file HTML."""

from __future__ import annotations

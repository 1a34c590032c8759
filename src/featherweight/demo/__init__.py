"""What `featherweight demo` needs: a real pretrained network and a few real photos."""

from __future__ import annotations

from featherweight.demo.inputs import DemoInputs, prepare

__all__ = ["DemoInputs", "prepare"]

"""conv_spatial holds the contract of all techniques, also at ranks that are not worth their error."""

import pytest

from featherweight.techniques import _factor_site
from featherweight.testing.contract import TechniqueContract


@pytest.fixture(autouse=True)
def every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models have flat spectra: offer what would be refused for that."""
    monkeypatch.setattr(_factor_site, "worth", lambda *_: True)
    monkeypatch.setattr(_factor_site, "MOST_NOISE", 1.0)


class TestConvSpatial(TechniqueContract):
    technique = "conv_spatial"
    most_options = 3

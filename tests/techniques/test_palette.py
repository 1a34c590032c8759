"""palette holds the contract of all techniques, and its own promises."""

from featherweight.testing.contract import TechniqueContract


class TestPalette(TechniqueContract):
    technique = "palette"
    plain_per_channel = False  # a shared codebook has no scales

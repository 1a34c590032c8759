"""weight_nbit holds the contract of all techniques, and its own promises."""

from featherweight.testing.contract import TechniqueContract


class TestWeightNbit(TechniqueContract):
    technique = "weight_nbit"

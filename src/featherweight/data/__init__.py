"""Samples from npz, image folders, text or Python; splits; checks before any work."""

from featherweight.data.checks import check, check_batch, likeness
from featherweight.data.dataset import Batch, Dataset, InputSpec
from featherweight.data.opening import open_data
from featherweight.data.preprocess import PRESETS, Preprocess
from featherweight.data.splits import Splits, split, split_to_teach
from featherweight.data.spool import spool

__all__ = [
    "PRESETS",
    "Batch",
    "Dataset",
    "InputSpec",
    "Preprocess",
    "Splits",
    "check",
    "check_batch",
    "likeness",
    "open_data",
    "split",
    "split_to_teach",
    "spool",
]

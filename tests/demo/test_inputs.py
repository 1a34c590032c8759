"""The demo's data: whole photos a split, the same bytes each time, licences told."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

from featherweight.demo import inputs, prepare
from featherweight.errors import DataError


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    inputs.write_crops(folder)
    return folder


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_no_photo_is_in_two_splits(crops: Path) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in _rows(crops):
        assert (crops / row["file"]).is_file()
        splits[row["file"].rsplit("-", 1)[0]].add(row["split"])
    assert len(splits) == 16
    assert all(len(s) == 1 for s in splits.values())
    sizes = {s: sum(r["split"] == s for r in _rows(crops)) for s in ("calibration", "validation", "evaluation")}
    assert sizes == {"calibration": 96, "validation": 64, "evaluation": 96}


def test_the_same_bytes_each_time(crops: Path, tmp_path: Path) -> None:
    inputs.write_crops(tmp_path)
    names = {p.name for p in crops.iterdir()}
    assert names == {p.name for p in tmp_path.iterdir()}
    assert all((crops / n).read_bytes() == (tmp_path / n).read_bytes() for n in names)


def test_every_photo_has_its_licence_and_they_are_small() -> None:
    text = (inputs.PHOTOS / "LICENCES.md").read_text()
    named = set(
        re.findall(r"^\| `(\w+\.jpg)` \|.*(?:CC0 1\.0|CC BY 4\.0|public domain.*|no known copyright.*) \|$", text, re.M)
    )
    photos = list(inputs.PHOTOS.glob("*.jpg"))
    assert named == {p.name for p in photos}
    assert sum(p.stat().st_size for p in photos) < 1_200_000


def test_data_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent is not a folder"):
        prepare(tmp_path, tmp_path / "absent")


def test_given_data_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "efficientnet-lite0.onnx").write_bytes(b"already here")
    got = prepare(tmp_path, tmp_path / "mine")
    assert (got.data_source, got.metric) == (tmp_path / "mine", None)
    assert got.model_path.read_bytes() == b"already here"
    assert not (tmp_path / "photos").exists()

"""Image folders: tables, classes, splits, order, and hostile files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data import InputSpec, check, open_data, split
from featherweight.errors import DataError

SPEC = [InputSpec("x", np.dtype(np.float32), ("n", 3, 4, 4))]
RAW = "raw255,resize=none"


def _image(path: Path, value: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), (value,) * 3 if mode == "RGB" else value).save(path)


def _table(folder: Path, text: str, files: int = 6) -> Path:
    for i in range(files):
        _image(folder / f"images/{i}.png", i)
    (folder / "labels.csv").write_text(text)
    return folder


ROWS = "file,class_index,split\n" + "".join(
    f"images/{i}.png,{i % 3},{'calibration' if i % 2 else 'evaluation'}\n" for i in range(6)
)


def test_labels_csv_gives_pixels_labels_and_splits(tmp_path: Path) -> None:
    data = open_data(_table(tmp_path, ROWS), SPEC, preprocess=RAW, batch_size=2)
    check(data, SPEC, n_classes=3)
    parts = split(data)
    assert [b.n for b in data.batches()] == [2, 1, 2, 1]  # no batch mixes splits
    values = [
        sorted(float(r[0, 0, 0]) for b in p.batches() for r in b.feeds["x"])
        for p in (parts.calibration, parts.validation)
    ]
    assert sorted(values[0] + values[1]) == [1, 3, 5]
    assert [len(v) for v in values] == [2, 1]
    holdout = list(parts.holdout.batches())
    assert [float(r[0, 0, 0]) for b in holdout for r in b.feeds["x"]] == [0, 2, 4]
    assert np.concatenate([b.labels for b in holdout]).tolist() == [0, 2, 1]
    assert parts.holdout.labels().tolist() == [0, 2, 1]


def test_labels_csv_can_be_named_itself_and_labels_ignored(tmp_path: Path) -> None:
    _table(tmp_path, ROWS)
    assert open_data(tmp_path / "labels.csv", SPEC, preprocess=RAW).n_samples == 6
    assert not open_data(tmp_path, SPEC, preprocess=RAW, labels=False).has_labels


def test_validation_rows_are_honoured(tmp_path: Path) -> None:
    tags = ["train", "train", "val", "test", "test", ""]
    text = "path,label,subset\n" + "".join(f"images/{i}.png,{i},{t}\n" for i, t in enumerate(tags))
    parts = split(open_data(_table(tmp_path, text), SPEC, preprocess=RAW))
    assert [p.atoms() for p in (parts.calibration, parts.validation, parts.holdout)] == [[0, 1], [2], [3, 4]]
    assert "1 rows have an empty split" in parts.notes[0].text


def test_one_sided_split_column_falls_back_with_a_note(tmp_path: Path) -> None:
    text = "file,split\n" + "".join(f"images/{i}.png,train\n" for i in range(6))
    parts = split(open_data(_table(tmp_path, text), SPEC, preprocess=RAW))
    assert "has only calibration: divided by fractions" in parts.notes[0].text
    assert len(parts.holdout.atoms()) == 2


def test_class_folders_give_classes(tmp_path: Path) -> None:
    for i, name in enumerate(["cat", "ant", "dog", "ant"]):
        _image(tmp_path / name / f"{i}.png", i)
    data = open_data(tmp_path, SPEC, preprocess=RAW)
    assert data.labels().tolist() == [0, 0, 1, 2]
    assert "alphabetical order ('ant' is 0)" in data.notes[0].text
    named = open_data(tmp_path, SPEC, preprocess=RAW, class_names=["dog", "cat", "ant"])
    assert named.labels().tolist() == [2, 2, 1, 0]
    with pytest.raises(DataError, match="label 'cat' is not among the 2 class names"):
        open_data(tmp_path, SPEC, preprocess=RAW, class_names=["dog", "ant"])


def test_numbered_class_folders_keep_their_numbers(tmp_path: Path) -> None:
    for name in ("2", "10"):
        _image(tmp_path / name / "a.png", 1)
    data = open_data(tmp_path, SPEC, preprocess=RAW)
    assert sorted(data.labels().tolist()) == [2, 10]
    assert data.notes == ()


def test_split_folders_are_splits(tmp_path: Path) -> None:
    for i, part in enumerate(["train", "train", "val", "test"]):
        _image(tmp_path / part / "ab"[i % 2] / f"{i}.png", i)
    parts = split(open_data(tmp_path, SPEC, preprocess=RAW))
    assert [p.n_samples for p in (parts.calibration, parts.validation, parts.holdout)] == [2, 1, 1]


def test_plain_images_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        _image(tmp_path / f"{i}.png", i)
    data = open_data(tmp_path, SPEC, preprocess=RAW)
    assert not data.has_labels
    assert data.labels() is None
    assert [float(b.feeds["x"][0, 0, 0, 0]) for b in data.batches()] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    data = open_data(tmp_path, SPEC, preprocess=RAW)
    assert next(data.batches()).feeds["x"].shape == (1, 3, 4, 4)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png has I;16 pixels \(more than 8 bits\)"):
        next(open_data(tmp_path, SPEC, preprocess=RAW).batches())


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "text"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str) -> None:
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(
            tmp_path / f"{i}.jpg"
        )
    raw = (tmp_path / "3.jpg").read_bytes()
    bad = {"cut": raw[: len(raw) // 2], "noise": bytes(reversed(raw)), "empty": b"", "text": b"hello"}
    (tmp_path / "3.jpg").write_bytes(bad[damage])
    data = open_data(tmp_path, SPEC, preprocess="raw255,resize=8")
    with pytest.raises(DataError, match=r"3.jpg cannot be read as an image"):
        list(data.batches())


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.data.images.MAX_PIXELS", 15)
    _image(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match="has 4x4 pixels, over the limit of 15"):
        next(open_data(tmp_path, SPEC, preprocess=RAW).batches())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n../secret.png,0\n", "line 2: the path '../secret.png' must lie inside"),
        ("file,label\n/etc/passwd,0\n", "line 2: the path '/etc/passwd' must lie inside"),
        ("file,label\nC:\\x.png,0\n", "must lie inside"),
        ("file,label\nimages\\..\\..\\x.png,0\n", "must lie inside"),
        ("file,label\nimages/0.png,0\nimages/nine.png,1\n", "line 3: there is no file 'images/nine.png'"),
        (
            "files,label\nimages/0.png,0\n",
            r"no column file or path .*columns are \['files', 'label'\]; did you mean 'files'",
        ),
        ("file,file\na,b\n", "the column 'file' twice"),
        ("file,label\nimages/0.png\n", "line 2 has 1 fields, but the header has 2"),
        ("file,label\nimages/0.png,\n", "line 2: 'label' is empty"),
        ("file,split\nimages/0.png,fold1\n", "split is 'fold1'; use calibration"),
        ("file,label\n", "calibration data is empty"),
        ("", "calibration data is empty"),
    ],
)
def test_wrong_tables_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(_table(tmp_path, text), SPEC, preprocess=RAW)


def test_an_empty_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calibration data is empty: .* holds no images"):
        open_data(tmp_path, SPEC)


def test_models_of_other_inputs_are_refused(tmp_path: Path) -> None:
    _image(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match="fills one input of rank 4"):
        open_data(tmp_path, [*SPEC, InputSpec("z", np.dtype(np.float32), (1,))])


def test_different_sizes_cannot_share_a_batch(tmp_path: Path) -> None:
    _image(tmp_path / "a.png", 1)
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    spec = [InputSpec("x", np.dtype(np.float32), ("n", 3, "h", "w"))]
    data = open_data(tmp_path, spec, preprocess="raw255,resize=none,crop=none", batch_size=2)
    with pytest.raises(DataError, match=r"a.png gives \(3, 4, 4\) but b.png gives \(3, 4, 5\)"):
        next(data.batches())


def test_a_fixed_batch_axis_is_filled(tmp_path: Path) -> None:
    for i in range(5):
        _image(tmp_path / f"{i}.png", i)
    data = open_data(tmp_path, [InputSpec("x", np.dtype(np.float32), (2, 3, 4, 4))], preprocess=RAW)
    assert [b.feeds["x"].shape[0] for b in data.batches()] == [2, 2]
    assert "1 of 5 rows are not used" in data.notes[0].text


def test_an_image_dataset_is_picklable(tmp_path: Path) -> None:
    data = open_data(_table(tmp_path, ROWS), SPEC, preprocess=RAW)
    again = pickle.loads(pickle.dumps(data))
    assert [b.feeds["x"].tobytes() for b in again.batches()] == [b.feeds["x"].tobytes() for b in data.batches()]


def test_real_photos_split_as_their_table_says(shared_data: Path) -> None:
    spec = [InputSpec("image", np.dtype(np.float32), ("n", 3, 224, 224))]
    parts = split(open_data(shared_data / "imagenet-samples", spec, preprocess="efficientnet-lite0"))
    assert [p.n_samples for p in (parts.calibration, parts.validation, parts.holdout)] == [250, 250, 500]
    assert parts.holdout.labels().tolist() == list(range(1, 1000, 2))
    batch = next(parts.holdout.batches())
    path = shared_data / "imagenet-samples" / batch.name
    with Image.open(path) as picture:
        left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float64)
    assert np.allclose(batch.feeds["image"][0], ((pixels / 255 - 0.498) / 0.502).transpose(2, 0, 1), atol=1e-6)

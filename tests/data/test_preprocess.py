"""The recipe: text, JSON, presets, what the shape decides; exact pixels against arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data import PRESETS, InputSpec, Preprocess
from featherweight.data.images import apply
from featherweight.data.preprocess import parse, resolve
from featherweight.errors import DataError

F32 = np.dtype(np.float32)
NCHW = InputSpec("x", F32, ("n", 3, 224, 224))


def test_text_form_is_read() -> None:
    spec = parse("resize=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,layout=nchw,order=bgr,scale=1/255")
    assert spec == Preprocess(256, 224, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "nchw", "bgr")
    assert parse("resize=240x320,crop=none").resize == (240, 320)
    assert parse("imagenet,interpolation=bicubic").mean == PRESETS["imagenet"].mean


def test_what_is_printed_can_be_read_again() -> None:
    for preset in PRESETS.values():
        resolved, _ = resolve(preset, InputSpec("x", F32, ("n", 3, "h", "w")))
        assert str(parse(str(resolved))) == str(resolved)


def test_json_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"preset": "unit", "resize": [32, 48], "mean": [0.5], "layout": "nhwc"}))
    assert parse(path) == Preprocess((32, 48), "input", 1 / 255, (0.5,), (1.0,), "nhwc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "no preprocess preset 'imagnet'; did you mean imagenet?"),
        ("resise=3", "no preprocess key 'resise'; did you mean resize?"),
        ("crop=0", r"crop must be 1..16384 pixels, but got 0"),
        ("resize=abc", "resize='abc' cannot be read"),
        ("resize=+x", r"resize must be a size, '\+32'"),
        ("std=0", "std must be > 0"),
        ("mean=1:2", "mean must have 1 or 3 finite values"),
        ("mean=nan", "mean must have 1 or 3 finite values"),
        ("layout=hwcn", "layout must be one of auto, nchw, nhwc, but got 'hwcn'"),
        ("unit,crop", "'crop' must be key=value"),
        ("scale=1/0", "scale='1/0' cannot be read"),
        ("none.json", "cannot be read"),
    ],
)
def test_wrong_specs_are_clear_errors(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("preset", "shape", "resize", "crop", "layout"),
    [
        ("imagenet", ("n", 3, 224, 224), 256, (224, 224), "nchw"),
        ("imagenet", ("n", 192, 192, 3), 219, (192, 192), "nhwc"),
        ("efficientnet-lite0", (1, 3, 224, 224), 256, (224, 224), "nchw"),
        ("efficientnet-lite1", (1, 3, "h", "w"), 272, (240, 240), "nchw"),
        ("efficientnet-lite2", (1, 260, 260, 3), 292, (260, 260), "nhwc"),
        ("clip", ("n", 3, 336, 336), 336, (336, 336), "nchw"),
    ],
)
def test_the_models_shape_decides_what_is_open(
    preset: str, shape: tuple[object, ...], resize: int, crop: tuple[int, int], layout: str
) -> None:
    spec, notes = resolve(preset, InputSpec("x", F32, shape))
    assert (spec.resize, spec.crop, spec.layout) == (resize, crop, layout)
    assert notes == []


def test_without_a_spec_the_assumption_is_said() -> None:
    spec, notes = resolve(None, NCHW)
    assert spec.mean == PRESETS["imagenet"].mean
    assert "assumed resize=256,crop=224x224" in notes[0].text
    assert resolve(None, InputSpec("x", F32, (1, 1, 28, 28)))[0].order == "gray"
    assert resolve(None, InputSpec("x", np.dtype(np.uint8), (1, 28, 28, 3)))[0].scale == 1.0


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("crop=200", ("n", 3, 224, 224), "preprocess gives 200x200 pixels, but input 'x' takes 224x224"),
        ("unit", ("n", 5, 224, 224), "where no axis is 1 or 3 channels"),
        ("unit", ("n", 10), "images need an input of rank 4"),
        ("unit,layout=nhwc", ("n", 3, 224, 224), "has 224 channels in layout nhwc"),
        ("imagenet", ("n", 1, 28, 28), "one-channel input needs one mean"),
    ],
)
def test_contradictions_are_errors(spec: str, shape: tuple[object, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve(spec, InputSpec("x", F32, shape))


def _picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def test_crop_and_normalisation_are_exact() -> None:
    picture = _picture(9, 12)
    pixels = np.asarray(picture).astype(np.float64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = ((pixels[2:6, 4:8] / 255 - mean) / std).transpose(2, 0, 1)
    recipe, _ = resolve("imagenet,resize=none", InputSpec("x", F32, ("n", 3, 4, 4)))
    got = apply(picture, recipe)
    assert got.dtype == np.float32
    assert np.allclose(got, want, rtol=0, atol=1e-6)
    bgr, _ = resolve("raw255,resize=none,order=bgr", InputSpec("x", F32, ("n", 4, 4, 3)))
    assert np.array_equal(apply(picture, bgr), pixels[2:6, 4:8, ::-1])


def test_short_side_resize_keeps_the_ratio() -> None:
    recipe, _ = resolve("resize=8,crop=none,scale=1", InputSpec("x", F32, ("n", "h", "w", 3)))
    # No crop was asked for: the picture keeps its ratio, its long side cut off to whole pixels.
    assert apply(_picture(10, 23), recipe).shape == (8, 18, 3)


def test_integer_inputs_get_plain_pixels() -> None:
    spec = InputSpec("x", np.dtype(np.uint8), ("n", 9, 12, 3))
    recipe, _ = resolve("raw255,resize=none", spec)
    picture = _picture(9, 12)
    assert np.array_equal(apply(picture, recipe), np.asarray(picture))
    with pytest.raises(DataError, match="takes pixels as they are"):
        apply(picture, resolve("unit,resize=none", spec)[0])


def test_a_crop_larger_than_the_picture_is_an_error() -> None:
    recipe, _ = resolve("unit,resize=none", InputSpec("x", F32, ("n", 3, 20, 20)))
    with pytest.raises(DataError, match="is 9x12 after resizing, smaller than the crop 20x20; set resize"):
        apply(_picture(9, 12), recipe)

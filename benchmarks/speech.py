"""Resemblyzer's speaker encoder as an ONNX file, and its mel windows of spoken digits. numpy only."""

from __future__ import annotations

import csv
import wave
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.models import package_file
from featherweight.demo.checkpoint import read_checkpoint
from featherweight.demo.network import Network

WEIGHTS = ("resemblyzer", "pretrained.pt")
_LAYERS, _HIDDEN, _BANDS, _FRAMES = 3, 256, 40, 160
_RATE, _FFT, _HOP = 16000, 400, 160
_WINDOW_STEP = 77  # 1.3 windows a second, the package's default
_COVERAGE = 0.75
_LOUDNESS_DB = -30.0
GROUP = 5


def write_resemblyzer(path: Path) -> Path:
    """Three LSTM layers, dense, ReLU, unit length: `mels` (batch, 160, 40) to `embedding` (batch, 256)."""
    t = read_checkpoint(package_file(*WEIGHTS), entry="model_state")
    net = Network("resemblyzer")
    x = net.input("mels", ["batch", _FRAMES, _BANDS])
    x = net.node("Transpose", [x], "frames_first", perm=(1, 0, 2))
    for layer in range(_LAYERS):
        x = _lstm(net, x, t, layer, last=layer == _LAYERS - 1)
    parts = [x, net.weight("linear.weight", t["linear.weight"]), net.weight("linear.bias", t["linear.bias"])]
    x = net.node("Relu", [net.node("Gemm", parts, "linear.y", transB=1)], "positive")
    length = net.node("ReduceL2", [x, net.weight("feature_axis", np.array([1]))], "length", keepdims=1)
    # The package divides by the length alone; a network that answers zeros would give NaN.
    length = net.node("Max", [length, net.weight("smallest", np.float32(1e-12))], "length_positive")
    net.node("Div", [x, length], "embedding")
    net.output("embedding", ["batch", _HIDDEN])
    net.save(path)
    return path


def _lstm(net: Network, x: str, t: Mapping[str, np.ndarray], layer: int, *, last: bool) -> str:
    """One layer over time (160, batch, in): all states (160, batch, 256), or the final one (batch, 256)."""

    def gates(kind: str) -> np.ndarray:
        # PyTorch stacks input, forget, cell, output; ONNX input, output, forget, cell.
        i, f, c, o = np.split(t[f"lstm.{kind}_l{layer}"], 4)
        return np.concatenate([i, o, f, c])[None]

    at = f"lstm.{layer}"
    bias = np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)
    parts = [x, net.weight(f"{at}.W", gates("weight_ih")), net.weight(f"{at}.R", gates("weight_hh"))]
    parts.append(net.weight(f"{at}.B", bias))
    y = net.node("LSTM", parts, f"{at}.states", place=1 if last else 0, hidden_size=_HIDDEN)
    axis = net.weight("direction_last" if last else "direction", np.array([0 if last else 1]))
    return net.node("Squeeze", [y, axis], f"{at}.y")


def prepare_voices(source: Path, target: Path, split: str) -> Path:
    """Mel windows (n, 160, 40) of groups of five clips of one speaker, and labels (n, 2): speaker, group."""
    if (target / "spec.json").exists():
        return target
    with (source / "labels.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["split"] == split]
    windows: list[np.ndarray] = []
    labels: list[tuple[int, int]] = []
    group = 0
    for index, speaker in enumerate(sorted({row["speaker"] for row in rows})):
        clips = [_clip(source / row["file"]) for row in rows if row["speaker"] == speaker]
        # The table goes digit by digit; drawn clips give groups of different words.
        order = np.random.default_rng(index).permutation(len(clips))
        for start in range(0, len(clips) - GROUP + 1, GROUP):
            found = mel_windows(np.concatenate([clips[i] for i in order[start : start + GROUP]]))
            windows.extend(found)
            labels.extend([(index, group)] * len(found))
            group += 1
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "mels.npy", np.stack(windows))
    np.save(target / "labels.npy", np.array(labels))
    (target / "spec.json").write_text(f'{{"kind": "voices", "batches": {len(windows)}}}')
    return target


def _clip(path: Path) -> np.ndarray:
    """A WAV of 16-bit mono at 16 kHz, at least as loud as the package asks, f32."""
    from scipy.signal import resample_poly

    with wave.open(str(path)) as f:
        rate, raw = f.getframerate(), f.readframes(f.getnframes())
    x = resample_poly(np.frombuffer(raw, "<i2") / 32768.0, _RATE, rate)
    louder_db = _LOUDNESS_DB - 10 * np.log10(np.mean(x * x))
    return np.asarray(x * 10 ** (max(louder_db, 0.0) / 20), np.float32)


def mel_windows(wave_16k: np.ndarray) -> np.ndarray:
    """Windows (n, 160, 40) f32 of power mel bands, cut as Resemblyzer's `compute_partial_slices` does."""
    frames = -(-(len(wave_16k) + 1) // _HOP)
    starts = list(range(0, max(1, frames - _FRAMES + _WINDOW_STEP + 1), _WINDOW_STEP))
    covered = (len(wave_16k) - starts[-1] * _HOP) / (_FRAMES * _HOP)
    if covered < _COVERAGE and len(starts) > 1:
        starts.pop()
    padded = np.pad(wave_16k, (0, max(0, (starts[-1] + _FRAMES) * _HOP - len(wave_16k))))
    mels = mel_bands(padded)
    return np.stack([mels[s : s + _FRAMES] for s in starts])


def mel_bands(wave_16k: np.ndarray) -> np.ndarray:
    """(frames, 40) f32: librosa's `melspectrogram` at 25 ms windows, 10 ms steps (periodic Hann, centred, zeros)."""
    padded = np.pad(wave_16k.astype(np.float64), _FFT // 2)
    count = 1 + (len(padded) - _FFT) // _HOP
    rows = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP][:count]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power = np.abs(np.fft.rfft(rows * hann, axis=1)) ** 2
    return np.asarray(power @ _mel_filters().T, np.float32)


def _mel_filters() -> np.ndarray:
    """(40, 201): triangles of area one on Slaney's scale (linear below 1 kHz, logarithmic above)."""
    step, knee, log_step = 200 / 3, 1000.0, np.log(6.4) / 27
    top = knee / step + np.log(_RATE / 2 / knee) / log_step
    mels = np.linspace(0, top, _BANDS + 2)
    edges = np.where(mels < knee / step, step * mels, knee * np.exp(log_step * (mels - knee / step)))
    bins = np.linspace(0, _RATE / 2, _FFT // 2 + 1)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.asarray(np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None])


def group_vectors(embeddings: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n, d) window embeddings and their group (n,) -> the groups' mean, unit length (g, d)."""
    sums = np.stack([embeddings[groups == g].mean(0) for g in np.unique(groups)])
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12))


def equal_error_rate(vectors: np.ndarray, speakers: np.ndarray) -> float:
    """Where as many pairs (g, d) of one speaker fall below the threshold on cosine as pairs of two lie above."""
    i, j = np.triu_indices(len(speakers), 1)
    scores = (vectors @ vectors.T)[i, j]
    same = speakers[i] == speakers[j]
    order = np.argsort(scores, kind="stable")
    missed = np.cumsum(same[order]) / same.sum()
    false = 1 - np.cumsum(~same[order]) / (~same).sum()
    at = int(np.argmin(np.abs(missed - false)))
    return float((missed[at] + false[at]) / 2)

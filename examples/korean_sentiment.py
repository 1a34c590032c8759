"""Korean film reviews, good or bad: a large teacher trained from scratch, a student over ten times smaller.

    python examples/korean_sentiment.py [TRAIN.tsv TEST.tsv]

Both files have the columns label (0 or 1) and text. Without them a few made-up reviews show that it runs. Needs the
extra `learn`. What reads the reviews: hashed syllable n-grams (1 to 4), each with a vector; their sum goes through a
ReLU and one layer. The teacher has 65 536 vectors of 32 numbers. The student folds the same n-grams into 8192 of 8.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import featherweight as fw
from featherweight.graph import io
from featherweight.learn.execute import Executor
from featherweight.learn.losses import cross_entropy
from featherweight.runtime import ort
from featherweight.runtime.significance import mcnemar

HASHES, LENGTH = 1 << 16, 256
TEACHER, STUDENT = (HASHES, 32), (1 << 13, 8)
TOY = (1 << 12, 16), (256, 8)
GOOD = ("정말 재미있다", "최고의 영화", "감동적이에요", "배우 연기가 훌륭하다", "또 보고 싶다", "눈물이 났다 강추")
BAD = ("너무 지루하다", "최악의 영화", "돈이 아깝다", "연기가 어색하다", "시간 낭비였다", "졸려서 나왔다 비추")
ABOUT = (
    "어제 봤는데",
    "친구랑 봤다",
    "기대했는데",
    "주말에 본",
    "솔직히",
    "이 감독 작품은",
    "포스터만 보고 갔는데",
    "음",
)


def grams(text: str) -> list[int]:
    """Numbers from 1 of the different n-grams, shortest first."""
    text = f"^{' '.join(text.split())}$"
    found = dict.fromkeys(text[i : i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1))
    return [1 + zlib.crc32(g.encode()) % (HASHES - 1) for g in found]


def rows(texts: list[str]) -> np.ndarray:
    """(n, LENGTH) int64, padded with 0."""
    found = np.zeros((len(texts), LENGTH), np.int64)
    for row, text in zip(found, texts, strict=True):
        own = grams(text)[:LENGTH]
        row[: len(own)] = own
    return found


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Texts and labels of a table."""
    with path.open(newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r["text"] for r in table], np.array([int(r["label"]) for r in table])


def made_up(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Reviews put together from phrases, a tenth of them with the other label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    texts = [f"{rng.choice(ABOUT)} {rng.choice(GOOD if good else BAD)} {rng.choice(ABOUT)}" for good in labels]
    return texts, np.where(rng.random(n) < 0.1, 1 - labels, labels)


def spliced(texts: list[str], n: int) -> list[str]:
    """`n` more texts without labels: the beginning of one review and the end of another."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(texts), (n, 2))
    return [texts[a][: len(texts[a]) // 2] + " " + texts[b][len(texts[b]) // 2 :] for a, b in pairs]


def thinned(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the n-grams, but always the first."""
    found: np.ndarray = np.where(rng.random(x.shape) < 0.5, 0, x)
    found[:, 0] = x[:, 0]
    return found


def network(path: Path, size: tuple[int, int], seed: int) -> Path:
    """grams (n, LENGTH) -> logits (n, 2): vectors summed over the n-grams, divided by the root of their number."""
    (buckets, width), rng = size, np.random.default_rng(seed)
    stored = {
        "buckets": np.array(buckets), "zero": np.array(0), "axis": np.array([1]), "last": np.array([2]),
        "table": rng.normal(size=(buckets, width)) * 0.1,
        "w": rng.normal(size=(width, 2)) / width**0.5, "b": np.zeros(2),
    }  # fmt: skip
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Mod", ["grams", "buckets"], "bucket", {}),
        ("Gather", ["table", "bucket"], "vectors", {}),
        ("Equal", ["grams", "zero"], "empty", {}),
        ("Not", ["empty"], "there", {}),
        ("Cast", ["there"], "weight", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["weight", "last"], "weights", {}),
        ("Mul", ["vectors", "weights"], "counted", {}),
        ("ReduceSum", ["counted", "axis"], "sum", {"keepdims": 0}),
        ("ReduceSum", ["weight", "axis"], "number", {"keepdims": 1}),
        ("Sqrt", ["number"], "root", {}),
        ("Div", ["sum", "root"], "mean", {}),
        ("Relu", ["mean"], "active", {}),
        ("Gemm", ["active", "w", "b"], "logits", {}),
    )
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [made], name=f"{made}/{op}", **more) for op, inputs, made, more in steps],
        "sentiment",
        [helper.make_tensor_value_info("grams", TensorProto.INT64, ["n", LENGTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(a if a.dtype.kind == "i" else a.astype(np.float32), n) for n, a in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def train(start: Path, x: np.ndarray, y: np.ndarray, out: Path, *, epochs: int) -> Path:
    """Learn from labels; half of the n-grams, others at each step, are hidden, so that none is relied on alone."""
    model = io.load(start)
    network = Executor(model)
    adam = torch.optim.Adam(network.parameters(), 3e-3)
    seeded = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in np.array_split(seeded.permutation(len(x)), max(1, len(x) // 64)):
            seen = torch.from_numpy(thinned(x[batch], seeded))
            adam.zero_grad()
            loss = cross_entropy(network({"grams": seen})["logits"], torch.from_numpy(y[batch]), axis=1)
            torch.autograd.backward(loss)
            adam.step()
    io.save(network.write_back(model), out)
    return out


def main() -> int:
    """Train, distil, encode, and compare on the test reviews."""
    given = [read(Path(p)) for p in sys.argv[1:3]] or [made_up(400, 0), made_up(200, 1)]
    (texts, labels), (test_texts, test_labels) = given
    large = len(texts) > 1000
    teacher_size, student_size = (TEACHER, STUDENT) if large else TOY
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x, test_x = rows(texts), rows(test_texts)
        begun = network(folder / "t.onnx", teacher_size, 0)
        files = {"teacher": train(begun, x, labels, folder / "teacher.onnx", epochs=4)}
        small = network(folder / "s.onnx", student_size, 1)
        files["student, labels alone"] = train(small, x, labels, folder / "alone.onnx", epochs=6)

        unlabelled = folder / "unlabelled.npz"
        more = np.concatenate([x, x, rows(spliced(texts, 2 * len(texts)))])
        np.savez(unlabelled, grams=np.concatenate([x, thinned(more, np.random.default_rng(0))]))
        found = fw.distill(
            files["teacher"], small, unlabelled, out=folder / "run", stages=("end",), loss="kl", features=0, rate=0.03,
            temperature=1.0, batch_size=64, max_steps=1500 if large else 150,
        )  # fmt: skip
        files["student, distilled"] = found.model
        report = fw.compress(
            found.model, unlabelled, out=folder / "small", max_size="30%", metric="agreement",
            time_budget="60s" if large else "5s",
        )  # fmt: skip
        if report.ok:
            files["student, distilled and encoded"] = folder / "small" / "model.onnx"

        right = {
            what: (ort.run_model(path, [{"grams": test_x}])[0]["logits"].argmax(1) == test_labels).astype(float)
            for what, path in files.items()
        }
        for what, path in files.items():
            gained, lost, p = mcnemar(right["student, labels alone"], right[what])
            against = f"against labels alone +{gained} -{lost}, p {p:.2g}" if "distilled" in what else ""
            print(f"{what:31} {path.stat().st_size:>10,} B  accuracy {right[what].mean():.4f}  {against}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

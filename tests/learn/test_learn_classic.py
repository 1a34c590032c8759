"""The classic result (Hinton 2015): a small network learns more from a large one's answers than from labels alone.

Data: the 1797 handwritten digits (8 x 8, values 0 to 16) of `digits.npz`, which is the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi 10.24432/C50P49,
CC BY 4.0).
All networks are ONNX graphs with random weights, trained from scratch through the executor.
"""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from featherweight.demo.network import Network  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.learn import losses  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

# Settings were chosen with the seeds from 0 on; these are fresh.
FIRST_SEED, SEEDS = 100, 8
LABELLED, TEST = 100, 500
FASHION = Path("/usr/share/datasets/fashion-mnist")


def network(path: Path, seed: int, *, side: int, channels: tuple[int, ...], hidden: int) -> Path:
    """Convolutions with pooling (or none) and two dense layers, with He-normal weights."""
    random = np.random.default_rng(seed)
    net = Network("classifier")
    x = net.input("image", ["batch", 1, side, side])
    width = 1
    for i, made in enumerate(channels):
        x = net.node("Conv", [x, *_layer(net, random, f"c{i}", made, width, 3, 3)], f"y{i}", pads=[1, 1, 1, 1])
        x = net.node("MaxPool", [net.node("Relu", [x], f"r{i}")], f"p{i}", kernel_shape=[2, 2], strides=[2, 2])
        width = made
    x = net.node("Flatten", [x], "flat")
    width *= (side // 2 ** len(channels)) ** 2
    x = net.node("Relu", [net.node("Gemm", [x, *_layer(net, random, "d", hidden, width)], "h", transB=1)], "hr")
    net.node("Gemm", [x, *_layer(net, random, "out", 10, hidden)], "logits", transB=1)
    net.output("logits", ["batch", 10])
    net.save(path)
    return path


def _layer(net: Network, random, name: str, *shape: int) -> list[str]:
    weight = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return [net.weight(f"{name}.w", weight.astype(np.float32)), net.weight(f"{name}.b", np.zeros(shape[0], np.float32))]


def train(executor: Executor, x, target, loss, *, seed: int, steps: int, rate: float, noise: float = 0.0) -> None:
    """Adam with a one-cycle rate over random batches of 64, with Gaussian noise on the pictures if asked."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(executor.parameters(), rate, weight_decay=0.01, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        seen = x[rows]
        if noise:
            seen = seen + noise * torch.randn(seen.shape, generator=generator)
        optimiser.zero_grad()
        loss(executor({"image": seen})["logits"], target[rows]).backward()
        optimiser.step()
        cycle.step()


def answers(executor: Executor, x):
    with torch.no_grad():
        return executor({"image": x})["logits"]


def by_labels(student, y):
    return losses.cross_entropy(student, y, axis=1)


def by_teacher(student, teacher):
    return losses.divergence(student, teacher, axis=1)


def right(executor: Executor, x, y) -> np.ndarray:
    return (answers(executor, x).argmax(1) == y).numpy()


def one_sided_p(differences: np.ndarray) -> float:
    """P(mean this large or larger | no difference) of paired differences: Student's t, n - 1 degrees of freedom."""
    from scipy import stats

    if np.ptp(differences) == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(stats.ttest_1samp(differences, 0, alternative="greater").pvalue)


def digits(seed: int):
    with np.load(Path(__file__).with_name("digits.npz")) as data:
        x = torch.tensor(data["images"][:, None].astype(np.float32) / 16)
        y = torch.tensor(data["labels"].astype(np.int64))
    order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))
    return x[order], y[order]


def compare(
    folder: Path,
    seed: int,
    x,
    y,
    *,
    few: slice,
    pool: slice,
    test: slice,
    side: int,
    steps: tuple[int, int],
    inner: int,
    noise: float,
):
    """(accuracy of teacher, student alone, student distilled, student of shuffled answers), the distilled student.

    Teacher and lone student see the `few` labels; the distilled one sees the teacher's answers on `pool`, no labels.
    The three students start from the same weights and take the same steps; noise on the few labelled pictures, which
    helps the teacher, helps the lone student as well.
    """
    large = Executor(io.load(network(folder / "teacher.onnx", seed, side=side, channels=(16, 32), hidden=128)))
    train(large, x[few], y[few], by_labels, seed=seed, steps=steps[0], rate=5e-3 if noise else 3e-3, noise=noise)
    small = network(folder / "student.onnx", 100 + seed, side=side, channels=(), hidden=inner)
    alone, taught, misled = (Executor(io.load(small)) for _ in range(3))
    given = answers(large, x[pool])
    rate = 0.24 / side
    train(alone, x[few], y[few], by_labels, seed=seed, steps=steps[1], rate=rate, noise=noise)
    train(taught, x[pool], given, by_teacher, seed=seed, steps=steps[1], rate=rate)
    train(misled, x[pool], given.roll(1, 0), by_teacher, seed=seed, steps=steps[1], rate=rate)
    return [right(e, x[test], y[test]).mean() for e in (large, alone, taught, misled)], taught


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Accuracies, one row a seed; the folder with the files of the last; test pictures and its answers to them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("classic")
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        x, y = digits(seed)
        test, pool, few = slice(0, TEST), slice(TEST, None), slice(TEST, TEST + LABELLED)
        row, taught = compare(
            folder, seed, x, y, few=few, pool=pool, test=test, side=8, steps=(200, 300), inner=8, noise=0.2
        )
        rows.append(row)
    io.save(taught.write_back(io.load(folder / "student.onnx")), folder / "taught.onnx")
    return np.array(rows), folder, x[test], answers(taught, x[test])


def test_the_student_is_ten_times_smaller(runs):
    _, folder, _, _ = runs
    sizes = [
        sum(v.const_value.size for v in io.load(folder / f"{name}.onnx").graph.initializers.values())
        for name in ("teacher", "student")
    ]
    assert sizes[0] >= 10 * sizes[1]


def test_distilled_beats_trained_alone(runs):
    """By a paired t-test over the seeds, which draw other labels, other test pictures and other weights."""
    accuracy, _, _, _ = runs
    teacher, alone, taught, _ = accuracy.T
    gain = taught - alone
    spread = gain.std(ddof=1)
    said = (
        f"teacher {teacher.mean():.3f}, alone {alone.mean():.3f} (sd {alone.std(ddof=1):.3f}), distilled "
        f"{taught.mean():.3f} (sd {taught.std(ddof=1):.3f}), gain {gain.mean():.3f} (sd {spread:.3f}, n {SEEDS})"
    )
    assert teacher.mean() > alone.mean(), said
    assert one_sided_p(gain) < 0.01, said
    assert gain.mean() > 0.01, said


def test_the_statistic_can_fail(runs):
    """Answers that belong to other pictures teach nothing, and the same test then says so."""
    accuracy, _, _, _ = runs
    _, alone, _, misled = accuracy.T
    assert one_sided_p(misled - alone) > 0.5
    assert one_sided_p(np.zeros(SEEDS)) == 1.0
    assert one_sided_p(np.array([0.02, -0.01, 0.01, -0.02, 0.015, -0.012, 0.0, 0.001])) > 0.1


def test_the_file_holds_what_was_learned(runs):
    _, folder, x, expected = runs
    found = ort.run_model(folder / "taught.onnx", [{"image": x.numpy()}])[0]["logits"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def fashion(name: str):
    """Pictures (n, 1, 28, 28) in 0 to 1 and classes (n,) of a split of Fashion-MNIST (Xiao 2017, arXiv:1708.07747)."""
    with gzip.open(FASHION / f"{name}-images-idx3-ubyte.gz") as f:
        pixels = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(FASHION / f"{name}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return torch.tensor(pixels.astype(np.float32) / 255), torch.tensor(labels.astype(np.int64))


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_distilled_beats_trained_alone_on_fashion(tmp_path):
    """1000 labelled pictures, 20 000 without labels, tested on the official 10 000; three seeds."""
    torch.set_num_threads(1)
    (x, y), (test_x, test_y) = fashion("train"), fashion("t10k")
    rows = []
    for seed in range(3):
        order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))[:20000]
        all_x, all_y = torch.cat([x[order], test_x]), torch.cat([y[order], test_y])
        few, pool, test = slice(0, 1000), slice(0, 20000), slice(20000, None)
        row, _ = compare(
            tmp_path, seed, all_x, all_y, few=few, pool=pool, test=test, side=28, steps=(400, 2000), inner=16, noise=0.0
        )
        rows.append(row)
    teacher, alone, taught, misled = np.array(rows).T
    said = f"teacher {teacher}, alone {alone}, distilled {taught}"
    assert one_sided_p(taught - alone) < 0.05, said
    assert one_sided_p(misled - alone) > 0.5

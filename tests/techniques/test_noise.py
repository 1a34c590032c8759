"""The closed-form noise of an integer layer follows what real kernels do."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from featherweight.core import Action, Profile
from featherweight.errors import FeatherweightError
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.stats.streaming import instrumented
from featherweight.techniques import _noise, _units, get
from featherweight.techniques._protocol import Context


class InProcess:
    def call(self, func, *args, timeout_s=None):
        return func(*args)


def test_pivots_of_a_diagonal_are_its_sum():
    second = np.diag([4.0, 1.0, 0.25])[None]
    assert _noise.pivots(second)[0] == pytest.approx(5.25, rel=0.02)  # damping adds 1 % of the mean


def test_pivots_of_correlated_inputs_are_smaller_than_their_power():
    second = np.full((1, 3, 3), 0.99) + np.eye(3)[None] * 0.01
    assert _noise.pivots(second)[0] < 1.2
    assert np.einsum("gii->g", second)[0] == pytest.approx(3.0)


def test_signal_is_the_variance_of_the_outputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5)) + 3
    w = rng.normal(size=(1, 2, 5)).astype(np.float32)
    second, mean = (x.T @ x / len(x))[None], x.mean(axis=0)[None]
    assert _noise.signal(w, second, mean) == pytest.approx((x @ w[0].T).var(axis=0).sum(), rel=1e-5)


@pytest.mark.slow
def test_estimates_rank_the_layers_of_lite0_as_real_kernels_do(tmp_path, shared_data):
    from PIL import Image

    from featherweight.demo import lite0

    try:
        path = lite0.write(tmp_path / "lite0.onnx")
    except (FeatherweightError, ImportError, FileNotFoundError) as e:
        pytest.skip(f"no weights of Lite0 here: {e}")
    model = normalise(io.load(path), run=None).model
    feeds = []
    for file in sorted((shared_data / "imagenet-samples" / "images").glob("*.jpg"))[:400:20]:
        pixels = np.asarray(Image.open(file).convert("RGB").resize((224, 224)), np.float32) / 255
        feeds.append(
            {model.graph.inputs[0].name: ((pixels - 0.498) / 0.502).transpose(2, 0, 1)[None].astype(np.float32)}
        )
    stats = collect(model, feeds, worker=InProcess(), threads=2)
    ctx = Context(Profile("p", "x86_64", 1, 1 << 33, True), stats)
    technique = get("static_int8")
    predicted, measured = [], []
    for site in technique.sites(model):
        action = Action.of("static_int8", weight_bits=8)
        predicted.append(technique.estimate(model, site, action, ctx).noise)
        node = _units.find(model, site.name).main_use.node
        name = _units.folded(node.outputs[0])[0].name
        copy = surgery.copy_model(model)
        technique.apply(copy, site, action, ctx)
        technique.finish(copy, ctx)
        runs = [ort.session(io.to_bytes(instrumented(m, {name})), threads=2) for m in (model, copy)]
        a, b = (np.concatenate([r.run(f)[name] for f in feeds[:4]]).astype(np.float64) for r in runs)
        spread = a - a.mean(axis=tuple(i for i in range(a.ndim) if i != 1), keepdims=True)
        measured.append(np.square(a - b).sum() / np.square(spread).sum())
    assert spearmanr(predicted, measured).statistic > 0.7

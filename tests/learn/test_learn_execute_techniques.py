"""Whatever the techniques write is executed as the runtime does, trained, and written back in the same encoding."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.graph import io  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.runtime import ort  # noqa: E402
from featherweight.techniques import all_techniques  # noqa: E402
from featherweight.testing import contract, graphs  # noqa: E402

QUICK = ("gemm_matmul", "convolutions", "embedding")


def tensors(feeds) -> dict:
    return {k: torch.from_numpy(np.array(v)) for k, v in feeds.items()}


def worst(mine: dict, theirs: dict) -> float:
    """Largest difference over outputs, as a share of the largest value where that exceeds 1."""
    return max(float(np.abs(mine[k].detach().numpy() - v).max() / max(1.0, np.abs(v).max())) for k, v in theirs.items())


def check(trial: contract.Trial, feeds) -> None:
    model = ir.from_proto(onnx.load_from_string(trial.saved))
    executor = Executor(model)
    assert not [n for n in executor.fenced if "no gradient" in n.text]
    outputs = executor(tensors(feeds))
    assert worst(outputs, ort.session(trial.saved, optimize=False).run(feeds)) < 1e-4
    assert io.to_bytes(executor.write_back(model)) == io.to_bytes(model)
    sum(v.square().sum() for v in outputs.values() if v.requires_grad).backward()
    with torch.no_grad():
        for parameter in executor.parameters_by_name().values():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad.sign() * parameter.abs().mean()
    written = executor.write_back(model)
    assert {k: (v.dtype, v.shape) for k, v in written.graph.initializers.items()} == {
        k: (v.dtype, v.shape) for k, v in model.graph.initializers.items()
    }
    assert [n.op_type for n in written.graph] == [n.op_type for n in model.graph]
    assert worst(executor(tensors(feeds)), ort.session(io.to_bytes(written), optimize=False).run(feeds)) < 1e-3


@pytest.mark.parametrize("technique", sorted(all_techniques()))
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in graphs.NAMES])
def test_compressed_networks_are_executed_trained_and_written_back(technique, name) -> None:
    feeds = contract.prepared(name)[0].feeds[0]
    for trial in contract.trials(technique, name, 1):
        check(trial, feeds)


SIZES = ((1, 8), (2, 24), (5, 40))


def real_models() -> list:
    folder = Path(os.environ.get("FEATHERWEIGHT_MODELS", "/nowhere"))
    found = [pytest.param(p, id=p.stem) for p in sorted(folder.glob("*.onnx"))]
    missing = pytest.mark.skip(reason="no folder of real networks (set FEATHERWEIGHT_MODELS)")
    return found or [pytest.param(None, marks=missing)]


@pytest.mark.slow
@pytest.mark.parametrize("path", real_models())
def test_real_networks_are_equal_at_several_sizes_and_every_weight_has_a_gradient(path: Path) -> None:
    model, session = io.load(path), ort.session(path)
    executor, rng = Executor(model), np.random.default_rng(0)
    assert executor.fenced == ()
    for batch, length in SIZES:
        feeds: dict = {}
        for info in session.inputs:
            shape = [d if isinstance(d, int) else (batch if i == 0 else length) for i, d in enumerate(info.shape)]
            feeds[info.name] = rng.standard_normal(shape).astype(np.float32)
            if info.dtype == "int64":
                feeds[info.name] = rng.integers(0, 2 if "ids" not in info.name or "type" in info.name else 1000, shape)
        outputs = executor(tensors(feeds))
        for name, expected in session.run(feeds).items():
            np.testing.assert_allclose(outputs[name].detach().numpy(), expected, atol=1e-4, rtol=1e-4)
    sum(v.square().mean() for v in outputs.values()).backward()
    assert all(p.grad is not None for p in executor.parameters_by_name().values())
    assert io.to_bytes(executor.write_back(model)) == io.to_bytes(model)

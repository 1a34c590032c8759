"""Every shared case, executed: equal to ONNX Runtime, and with a gradient to its weights; the exceptions by name.

The cases lie outside the repository; whatever is in their folder is tried.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from e2e.judging import Case, shared_cases  # noqa: E402
from featherweight.errors import ModelError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.graph.normalise import normalise  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

ATOL = 1e-4
NOT_READABLE = {"external_data_file_missing": "the file 'external_data_file_missing.data'"}
REFUSED_BY_RUNTIME = {"duplicate_node_names"}
"""The runtime loads these only after repairs, which is what is executed then."""
FENCED: dict[str, str] = {}
"""Cases of which a part runs without a gradient, and a word of its note."""
CASES = [pytest.param(c, id=c.name) for c in shared_cases()] or [
    pytest.param(None, marks=pytest.mark.skip(reason="no shared cases here (set FEATHERWEIGHT_SHARED)"))
]


def largest_difference(mine: dict, theirs: dict) -> float:
    """Over all outputs, absolute; shapes and types must agree."""
    assert set(mine) == set(theirs)
    worst = 0.0
    for name, expected in theirs.items():
        got = mine[name].detach().numpy()
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        if expected.size:
            worst = max(worst, float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_case_is_executed_as_the_runtime_does_and_trains(case: Case) -> None:
    if case.name in NOT_READABLE:
        with pytest.raises(ModelError, match=NOT_READABLE[case.name]):
            io.load(case.model)
        return
    model, feeds = io.load(case.model), case.inputs
    if case.name in REFUSED_BY_RUNTIME:
        model = normalise(model, run=None).model
    expected = ort.session(io.to_bytes(model), optimize=False).run(feeds)
    executor = Executor(model)
    outputs = executor({k: torch.from_numpy(v) for k, v in feeds.items()})
    assert largest_difference(outputs, expected) < ATOL
    if case.name in FENCED:
        assert any(FENCED[case.name] in note.text for note in executor.fenced)
    else:
        assert executor.fenced == ()
    parameters = executor.parameters_by_name()
    assert parameters
    loss = sum(o.float().square().sum() for o in outputs.values() if o.requires_grad)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters.values())


@pytest.mark.parametrize("case", CASES)
def test_case_is_written_back_as_it_was_and_runs_when_trained(case: Case) -> None:
    if case.name in NOT_READABLE or case.name in REFUSED_BY_RUNTIME:
        return
    model, feeds = io.load(case.model), case.inputs
    executor = Executor(model)
    assert io.to_bytes(executor.write_back(model)) == io.to_bytes(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in executor.parameters_by_name().values():
            spread = parameter.abs().mean() * 0.05
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * spread
    outputs = executor({k: torch.from_numpy(v) for k, v in feeds.items()})
    written = executor.write_back(model)
    expected = ort.session(io.to_bytes(written), optimize=False).run(feeds)
    assert largest_difference(outputs, expected) < 10 * ATOL * max(1.0, max(np.abs(v).max() for v in expected.values()))

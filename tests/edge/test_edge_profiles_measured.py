"""Measuring a profile: the timed models are what they say, and what comes out predicts. No test asserts a time."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner

from featherweight.cli import group
from featherweight.core import Profile
from featherweight.edge import measuring, profiles
from featherweight.edge.bench_graphs import chains
from featherweight.edge.observe import executed
from featherweight.edge.predict import latency_of_file
from featherweight.edge.work import works
from featherweight.errors import DataError
from featherweight.runtime import ort
from featherweight.runtime.profile_files import KERNEL_DIMS
from featherweight.runtime.targets import is_this_machine, load_profile

ALL = list(chains())
# One chain of each kind and precision, the smallest.
FEW = {(c.kind, c.precision): c for c in sorted(ALL, key=lambda c: -np.prod(c.dims))}


def test_kinds_have_the_dims_the_file_format_says() -> None:
    for chain in ALL:
        assert len(chain.dims) == KERNEL_DIMS.get(chain.kind, 1), chain.kind
    enough = Counter((c.kind, c.precision) for c in ALL)
    assert all(count >= 2 for count in enough.values())


@pytest.mark.parametrize("key", sorted(FEW), ids="-".join)
def test_a_link_of_a_chain_is_the_operator_it_stands_for(tmp_path, key) -> None:
    """Two links more are that many kernels of the kind more, with the multiply-accumulates that are written down."""
    chain = FEW[key]
    counts, macs = [], []
    for n in (1, 3) if not chain.once else (1, 2):
        path = tmp_path / f"{n}.onnx"
        path.write_bytes(chain.build(n))
        if not chain.optimize:  # seen with optimisation these would be folded into one another
            ort.session(path, optimize=False).run(chain.feeds)
            return
        jobs = [w for op in executed(path, chain.feeds) for w in works(op)]
        counts.append(sum(w.kind == chain.kind for w in jobs))
        macs.append(sum(w.macs for w in jobs if w.kind == chain.kind))
    links = 1 if chain.once else 2
    assert counts[1] - counts[0] == links * chain.per_link
    if chain.kind not in ("conv1x1", "conv", "conv_first", "depthwise"):  # their channels may be padded by the runtime
        assert macs[1] - macs[0] == links * chain.per_link * chain.macs


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile in a second: few kinds, two rounds, in this process."""
    kinds = {"matmul", "add", "conv1x1"}
    kept = [c for c in ALL if c.kind in kinds and c.precision == "float32" and np.prod(c.dims) < 1 << 18]

    class InProcess:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...
        def call(self, function, *args):
            return function(*args)

    monkeypatch.setattr(profiles, "Worker", InProcess)
    monkeypatch.setattr(measuring, "chains", lambda *, integer: iter(kept if integer else ()))
    monkeypatch.setattr(profiles, "_BANDWIDTH_MB", 8)
    monkeypatch.setattr(profiles, "MIN_ROUNDS", 2)


def test_a_measured_profile_predicts_here(few, tmp_path) -> None:
    found = profiles.measure_profile(seconds=0.1, name="mine", idle_w=2.0, busy_w=9.5)
    assert found.name == "mine"
    assert found.measured
    assert is_this_machine(found)
    assert (found.idle_w, found.busy_w) == (2.0, 9.5)
    assert {k.kind for k in found.kernels} == {"matmul", "add", "conv1x1"}
    assert all(k.us > 0 for k in found.kernels)
    assert found.rates["float32"] > 0
    assert found.memory_gb_per_s
    assert found.runtime_bytes
    assert found.node_us
    profiles.save_profile(found, tmp_path / "mine.json")
    assert load_profile(tmp_path / "mine.json") == found
    chain = FEW["matmul", "float32"]
    (tmp_path / "m.onnx").write_bytes(chain.build(3))
    predicted = latency_of_file(tmp_path / "m.onnx", found, chain.feeds)
    assert predicted.ms > 0
    assert predicted.from_measured > 0


def test_the_command_writes_and_prints_the_same(few, tmp_path) -> None:
    done = CliRunner().invoke(group, ["profile", "--json", "--time", "0.1s", "-o", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "p.json").read_text())
    shown = CliRunner().invoke(group, ["profile", "--time", "0.1s", "--name", "my board"])
    assert shown.exit_code == 0
    assert "my board" in shown.stdout
    assert "Operators" in shown.stdout


@pytest.mark.parametrize(
    ("asked", "text"),
    [({"threads": 0}, "threads must be 1 to"), ({"threads": 10**6}, "threads must be 1 to"), ({"seconds": 0}, "> 0 s")],
)
def test_senseless_requests_are_refused(asked, text) -> None:
    with pytest.raises(DataError, match=text):
        profiles.measure_profile(**asked)


def test_rates_are_the_best_of_large_products() -> None:
    rows = [
        ("matmul", "float32", (1, 2, 3), 10.0, 20_000), ("conv", "float32", (1,), 10.0, 50_000),
        ("depthwise", "float32", (1,), 10.0, 900_000), ("matmul", "int8_dynamic", (1, 2, 3), 10.0, 900_000),
        ("matmul", "int8", (1, 2, 3), 0.5, 900_000), ("matmul", "int4", (1, 2, 3), 2.0, 0),
    ]  # fmt: skip
    assert profiles._rates(rows) == {"float32": 5.0}


def test_counts_of_threads_double_and_end_with_all() -> None:
    assert [profiles._counts(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


@pytest.mark.slow
def test_this_machine_in_full() -> None:
    found: Profile = profiles.measure_profile(seconds=10)
    assert {k.kind for k in found.kernels} >= set(KERNEL_DIMS)
    assert {k.precision for k in found.kernels} >= {"float32", "int8", "int8_dynamic", "int4"}

"""The contract notices planted faults: a technique whose arithmetic is wrong does not pass it."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.techniques import _gptq, _place, get
from featherweight.testing import contract


class Contract(contract.TechniqueContract):
    technique = "weight_nbit"


Contract.__test__ = False
MODEL = "gemm_matmul"
TRUE_QUANTIZE = _gptq.quantize


@pytest.fixture
def planted(monkeypatch):
    """Install a faulty `quantize` and forget cached trials, before and after."""

    def install(change):
        def faulty(*args, **options):
            return change(TRUE_QUANTIZE(*args, **options))

        monkeypatch.setattr(_gptq, "quantize", faulty)
        contract.trials.cache_clear()

    yield install
    contract.trials.cache_clear()


def with_fields(q: _gptq.Quantized, **fields) -> _gptq.Quantized:
    return _gptq.Quantized(**{**vars(q), **fields})


FAULTS = {
    "scale twice too big": lambda q: with_fields(q, scale=q.scale * 2),
    "all codes zero": lambda q: with_fields(q, codes=np.zeros_like(q.codes)),
    "rows in the wrong order": lambda q: with_fields(q, codes=q.codes[:, ::-1].copy()),
    "columns in the wrong order": lambda q: with_fields(q, codes=q.codes[..., ::-1].copy()),
    "one code off": lambda q: with_fields(q, codes=np.clip(q.codes + 1, None, q.codes.max()).astype(np.int8)),
    "signs lost": lambda q: with_fields(q, codes=np.abs(np.maximum(q.codes, -q.codes.max()))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_arithmetic_is_noticed(planted, fault):
    planted(FAULTS[fault])
    checks = Contract()
    with pytest.raises(AssertionError):
        checks.test_rounding_is_no_worse_than_plain(MODEL)
    contract.trials.cache_clear()
    with pytest.raises(AssertionError):
        checks.test_noise_is_near_the_estimate(MODEL)


def test_wrong_bytes_are_noticed(monkeypatch):
    true = _place.encoded_bytes
    monkeypatch.setattr(_place, "encoded_bytes", lambda *a, **k: true(*a, **k) // 2)
    contract.trials.cache_clear()
    with pytest.raises(AssertionError, match="estimated"):
        Contract().test_bytes_are_as_estimated(MODEL)
    contract.trials.cache_clear()


def test_changed_input_model_is_noticed(monkeypatch):
    technique = get("weight_nbit")
    monkeypatch.setattr(contract.surgery, "copy_model", lambda model: model)
    contract.trials.cache_clear()
    small = contract.prepared.__wrapped__(MODEL)
    monkeypatch.setattr(contract, "prepared", lambda name: small)
    with pytest.raises((AssertionError, Exception), match=r"must not change|stored float weight|computed or already"):
        contract.trials(technique.name, MODEL, 3)
    contract.trials.cache_clear()

"""The server against its own OpenAPI description with generated requests; and a stock client of the protocol."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import serving
from serving import image

from featherweight.edge import http as blocks
from featherweight.runtime import ort


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "0123456789abcdef-token"])
def test_generated_requests_never_get_a_5xx(tmp_path, token):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    with serving.serving([serving.whole(tmp_path)], token=token, limits=blocks.Limits(body_bytes=1 << 20)) as running:
        schema = schemathesis.openapi.from_dict(_described(running))
        for operation in schema.get_all_operations():
            case_strategy = operation.ok().as_strategy()

            @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=case_strategy, known=st.booleans())
            def check(case, known):
                if known and "model" in (case.path_parameters or {}):
                    case.path_parameters.update({k: {"model": "whole"}.get(k, "1") for k in case.path_parameters})
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                answer = case.call(base_url=running.url, headers=headers, timeout=10)
                assert answer.status_code < 500, answer.text
                case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error, *_conformance()])

            check()
        assert running.ask("GET", "/v2/health/live")[0] == 200
        assert blocks.state(running.app).held_bytes == 0


def _conformance():
    from schemathesis.specs.openapi import checks

    return [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]


def _described(running):
    import json

    return json.loads(running.ask("GET", "/openapi.json")[2])


def test_the_triton_client_works_against_the_server(tmp_path):
    triton = pytest.importorskip("tritonclient.http")
    with serving.serving([serving.whole(tmp_path)]) as running:
        client = triton.InferenceServerClient(running.url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("whole")
        assert client.is_model_ready("whole", "1")
        assert not client.is_model_ready("other")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("whole")["inputs"][0]["shape"] == [-1, 3, 8, 8]
        expected = ort.session(serving.whole(tmp_path, "alone")).run({"image": image(2)})["logits"]
        for sent in (True, False):
            for back in (True, False, None):
                given = triton.InferInput("image", [2, 3, 8, 8], "FP32")
                given.set_data_from_numpy(image(2), binary_data=sent)
                outputs = None if back is None else [triton.InferRequestedOutput("logits", binary_data=back)]
                for compression in (None, "gzip", "deflate"):
                    found = client.infer(
                        "whole", [given], outputs=outputs, request_id="9", request_compression_algorithm=compression,
                        response_compression_algorithm=compression,
                    )  # fmt: skip
                    assert found.get_response()["id"] == "9"
                    np.testing.assert_allclose(found.as_numpy("logits"), expected, rtol=1e-5)
        with pytest.raises(triton.InferenceServerException, match="no model"):
            client.infer("other", [given])
        client.close()

"""Effects of decisions before anything runs."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx_ir import from_proto

from featherweight.core import Profile, Silent
from featherweight.search.candidates import all_sites
from featherweight.search.effects import SiteFacts, build_effects
from featherweight.techniques import Context, all_techniques

HERE = Profile("test", "", 1, 0, int8_dot=True)


def test_nodes_the_user_wants_in_float_have_no_option_of_any_technique():
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], "second"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 21)]
    )
    model = from_proto(proto)
    techniques = list(all_techniques().values())
    ctx = Context(HERE, keep_float=frozenset({"second"}))
    sites = all_sites(model, techniques)
    facts = {name: SiteFacts(1.0, site.size_bytes) for name, site in sites.items()}
    table = build_effects(model, sites, techniques, ctx, facts, Silent()).table
    assert [c.decision.keeps for c in table["w2"]] == [True]
    assert len(table["w1"]) > 1
    assert any(n.where == "w2" and "keep it in float" in n.text for n in ctx.notes)

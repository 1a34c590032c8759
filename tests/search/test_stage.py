"""The structure stage: its order, what is left of each weight, and plans put together and taken apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.core import Action, Decision, Plan, Profile
from featherweight.errors import PlanError
from featherweight.graph import cost, io
from featherweight.graph.normalise import normalise
from featherweight.graph.weights import weights
from featherweight.search import stage
from featherweight.search.candidates import build
from featherweight.techniques import Context, all_techniques, get
from pipeline.small import convnet
from search.fake_techniques import with_fakes

HERE = Profile("test", "", 1, 0, int8_dot=True)
PRUNE = Decision("channels of stem", (Action.of("front_channels", keep=16),))
SMALLER = Decision("resolution of x", (Action.of("input_resolution", rows=6, columns=6),))
FACTOR = Decision("w3", (Action.of("plain_svd", rank=8),))
EIGHT = Action.of("weight_nbit", bits=8, block=0)


class Said:
    """Remembers what was asked between the steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, tuple[int, ...]]] = []

    def recover(self, original: ir.Model, reduced: ir.Model) -> ir.Model:
        self.steps.append(("recover", shape_of(reduced)))
        assert shape_of(original) == (32, 32, 3, 3)
        return reduced

    def statistics(self, model: ir.Model) -> None:
        self.steps.append(("statistics", shape_of(model)))


def shape_of(model: ir.Model) -> tuple[int, ...]:
    found = {w.name: w.shape for w in weights(model)}
    return found.get("w3", found.get("w3/first", ()))


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    return normalise(io.load(convnet(tmp_path)), run=None).model


def test_channels_first_then_factors_with_recover_and_statistics_after_each(model):
    said = Said()
    made, left, _ = stage.run_stage(model, [FACTOR, PRUNE], Context(HERE), with_fakes(), said)
    assert said.steps == [
        ("recover", (32, 16, 3, 3)), ("statistics", (32, 16, 3, 3)),
        ("recover", (8, 16, 3, 3)), ("statistics", (8, 16, 3, 3)),
    ]  # fmt: skip
    assert left == {"w3": ("w3/first", "w3/second")}
    assert {w.name: w.shape for w in weights(made)}["w3/second"] == (32, 8, 1, 1)
    assert shape_of(model) == (32, 32, 3, 3)  # the caller's model is not changed


def test_numbers_go_on_at_each_factor_and_on_what_is_left_of_pruned_weights(model):
    plan = Plan((PRUNE, Decision("w3", (*FACTOR.actions, EIGHT)), Decision("w1", (EIGHT,))))
    built = build(model, plan, Context(HERE), with_fakes(), between=Said())
    floats = {w.name for w in weights(built)}
    assert "w2" in floats
    assert not floats.intersection({"w1", "w3", "w3/first", "w3/second"})
    assert stage.LEFT not in built.metadata_props
    assert io.stored_bytes(built) < 0.2 * io.stored_bytes(model)


def test_structure_without_data_is_refused(model):
    with pytest.raises(PlanError, match="changes the structure, which needs data"):
        build(model, Plan((PRUNE,)), Context(HERE), with_fakes())


def test_a_place_the_model_does_not_have_is_named(model):
    other = Decision("channels of elsewhere", PRUNE.actions)
    with pytest.raises(PlanError, match="structure at 'channels of elsewhere', which this model does not have"):
        stage.run_stage(model, [other], Context(HERE), with_fakes(), Said())


def test_a_plan_is_put_together_as_it_was_taken_apart():
    left = {"w3": ("w3/first", "w3/second")}
    numeric = Plan(tuple(Decision(n, (EIGHT,)) for n in ("w1", "w3/first", "w3/second")))
    whole = stage.whole_plan(["w1", "w2", "w3"], [PRUNE, FACTOR], numeric, left)
    assert whole.decisions == (
        PRUNE, Decision("w3", (*FACTOR.actions, EIGHT)), Decision("w1", (EIGHT,)), Decision("w2"),
    )  # fmt: skip
    assert stage.structure_part(whole, with_fakes()) == (PRUNE, FACTOR)
    assert set(stage.numeric_part(whole, with_fakes(), left).decisions) == set(numeric.decisions)


def test_factors_treated_differently_have_decisions_of_their_own():
    left = {"w3": ("w3/first", "w3/second")}
    numeric = Plan((Decision("w3/first", (EIGHT,)), Decision("w3/second")))
    whole = stage.whole_plan(["w3"], [FACTOR], numeric, left)
    assert whole.decisions == (FACTOR, Decision("w3/first", (EIGHT,)), Decision("w3/second"))
    assert stage.numeric_part(whole, with_fakes(), left).decisions == (Decision("w3/first", (EIGHT,)),)


def test_the_key_of_a_structure_is_its_model_and_decisions():
    key = stage.stage_key("ab", [PRUNE, FACTOR], 0)
    assert key == stage.stage_key("ab", [PRUNE, FACTOR], 0)
    assert len({key, stage.stage_key("cd", [PRUNE, FACTOR], 0), stage.stage_key("ab", [PRUNE], 0)}) == 3


def test_a_file_that_is_no_staged_model_is_refused(model, tmp_path):
    io.save(model, tmp_path / "structure.onnx")
    with pytest.raises(PlanError, match="must be the model after a run's structure stage"):
        stage.read(tmp_path / "structure.onnx", "", (), None)


def test_the_fake_factors_multiply_to_the_best_of_their_rank(model, tmp_path):
    made, _, _ = stage.run_stage(model, [FACTOR], Context(HERE), with_fakes(), Said())
    parts = {w.name: w.array() for w in weights(made)}
    whole = {w.name: w.array() for w in weights(model)}["w3"].reshape(32, -1)
    product = parts["w3/second"].reshape(32, 8) @ parts["w3/first"].reshape(8, -1)
    s = np.linalg.svd(whole, compute_uv=False)
    assert np.square(product - whole).sum() == pytest.approx(np.square(s[8:]).sum(), rel=1e-4)


def test_the_whole_model_first_and_its_answers_are_those_to_come_near_to(model):
    steps = []

    class Steps(Said):
        def recover(self, original: ir.Model, reduced: ir.Model) -> ir.Model:
            steps.append(("recover", "Resize" in kinds(original), "Resize" in kinds(reduced), shape_of(reduced)))
            return reduced

        def statistics(self, model: ir.Model) -> None:
            steps.append(("statistics", "Resize" in kinds(model), shape_of(model)))

    ctx = Context(HERE, input_shapes={"x": (1, 3, 12, 12)})
    made, left, _ = stage.run_stage(model, [FACTOR, SMALLER, PRUNE], ctx, with_fakes(), Steps())
    assert steps == [
        ("statistics", True, (32, 32, 3, 3)),
        ("recover", True, True, (32, 16, 3, 3)), ("statistics", True, (32, 16, 3, 3)),
        ("recover", True, True, (8, 16, 3, 3)), ("statistics", True, (8, 16, 3, 3)),
    ]  # fmt: skip
    assert "Resize" not in kinds(model)
    assert left == {"w3": ("w3/first", "w3/second")}
    counted = stage.cut_only(model, [SMALLER, PRUNE, FACTOR], ctx, with_fakes())
    shapes = {"input_shapes": ctx.input_shapes}
    assert cost.costs(counted, **shapes).macs == cost.costs(made, **shapes).macs
    whole = cost.costs(model, **shapes).macs
    alone = cost.costs(stage.cut_only(model, [SMALLER], ctx, with_fakes()), **shapes).macs
    assert alone == pytest.approx(whole * 0.25, rel=0.01)


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_channels_and_factors_together_are_counted_as_they_are_built(model):
    """Groups are numbered as the model was before a layer was taken apart: cut in one go they could not be."""
    prune = get("channel_prune")
    ctx = Context(HERE, input_shapes={"x": (1, 3, 12, 12)})
    site = next(s for s in prune.sites(model) if "w1" in s.tensors)
    decisions = [
        Decision("w3", (Action.of("conv_tucker", in_rank=8, out_rank=8),)),
        Decision(site.name, (Action.of("channel_prune", keep=16),)),
    ]
    counted = stage.cut_only(model, decisions, ctx, all_techniques())
    made, _, _ = stage.run_stage(model, decisions, ctx, all_techniques(), Said())
    shapes = {"input_shapes": ctx.input_shapes}
    assert cost.costs(counted, **shapes).macs == cost.costs(made, **shapes).macs < cost.costs(model, **shapes).macs

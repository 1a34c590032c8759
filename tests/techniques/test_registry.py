"""The registry finds techniques by file name and is loud about broken ones."""

import types

import onnx_ir as ir
import pytest

from featherweight.errors import TechniqueError
from featherweight.techniques import _protocol, all_techniques, checked, get


class Complete:
    name = "complete"
    stage = "numeric"
    integer = False

    def sites(self, model: ir.Model):
        return ()

    def options(self, model, site, ctx):
        return ()

    def estimate(self, model, site, action, ctx):
        return _protocol.Estimate(0, 0.0)

    def apply(self, model, site, action, ctx):
        return (site,)

    def finish(self, model, ctx):
        return None


def module(technique: object | None) -> types.ModuleType:
    made = types.ModuleType("made")
    if technique is not None:
        made.TECHNIQUE = technique
    return made


def test_complete_technique_is_accepted():
    assert checked(module(Complete()), "complete").name == "complete"


def test_missing_technique_is_an_error():
    with pytest.raises(TechniqueError, match="must end with TECHNIQUE"):
        checked(module(None), "complete")


def test_incomplete_technique_names_what_it_lacks():
    with pytest.raises(TechniqueError, match=r"lacks .*'finish'"):
        checked(module(object()), "complete")


def test_misnamed_technique_is_an_error():
    with pytest.raises(TechniqueError, match=r"'other', but got 'complete'"):
        checked(module(Complete()), "other")


def test_unknown_stage_is_an_error():
    odd = Complete()
    odd.stage = "later"
    with pytest.raises(TechniqueError, match="'later'"):
        checked(module(odd), "complete")


def test_names_are_file_names_in_stage_order():
    table = all_techniques()
    assert all(name == technique.name for name, technique in table.items())
    assert get("static_int8").name == "static_int8"


def test_unknown_name_lists_near_names():
    with pytest.raises(TechniqueError, match="did you mean static_int8"):
        get("static_int")


def test_notes_are_kept_once():
    from featherweight.core import Profile

    ctx = _protocol.Context(Profile("p", "x86_64", 1, 1 << 30, True))
    ctx.note("a", "b")
    ctx.note("a", "b")
    assert len(ctx.notes) == 1

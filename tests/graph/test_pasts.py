"""Inputs that are appended to, found by what is done with them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_tricks.graph.pasts import find_pasts
from onnx_tricks.patterns.dry_run import DryRun


def _model(view: str, shape: str, axis: int) -> ir.Model:
    """A model that appends `x` to a view of `past`."""
    return ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float{shape} past, float[B, 4, T, 8] x) => (present) <int64[1] one = {{1}}>
        {{ {view} new = Relu(x) present = Concat <axis = {axis}> (cached, new) }}
        """
    )


@pytest.mark.parametrize(
    ("view", "shape", "axis", "found"),
    [
        ("cached = Identity(past)", "[B, 4, P, 8]", 2, 2),
        ("cached = Identity(past)", "[B, 4, P, 8]", -2, 2),
        ("cached = Cast <to = 1> (past)", "[N, 4, N, 8]", 2, 2),
        ("cached = Transpose <perm = [0, 2, 1, 3]> (past)", "[B, P, 4, 8]", 2, 1),
        ("t = Cast <to = 1> (past) cached = Unsqueeze(t, one)", "[B, P, 8]", 2, 1),
        ("i = Constant <value_int = 0> () cached = Gather(past, i)", "[2, B, 4, P, 8]", 2, 3),
    ],
)
def test_the_axis_that_grows_is_found_behind_views(
    view: str, shape: str, axis: int, found: int
) -> None:
    model = _model(view, shape, axis)
    growth = find_pasts(model)[model.graph.inputs[0]]
    assert (growth.axis, growth.output) == (found, model.graph.outputs[0])


def test_what_is_joined_of_inputs_alone_is_no_past() -> None:
    model = _model("cached = Identity(past)", "[B, 4, P, 8]", 2)
    joined = next(node for node in model.graph if node.op_type == "Concat")
    joined.replace_input_with(1, model.graph.inputs[1])
    assert find_pasts(model) == {}


@pytest.mark.parametrize("shape", ["[?, 4, ?, 8]", "[N, 4, N, 8]"])
def test_pasts_without_names_of_their_own_are_empty_in_a_dry_run(shape: str) -> None:
    model = _model("cached = Cast <to = 1> (past)", shape, 2)
    past, new = model.graph.inputs
    run = DryRun(model)
    assert run.shape(past) == (2, 4, 0, 8)
    assert run.shape(model.graph.outputs[0]) == run.shape(new)

"""Caches of keys and values in one array, as ONNX Runtime's converter of GPT-2 writes them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Session
from onnx_tricks.verify import verify
from onnx_tricks.verify.cases import Step
from onnx_tricks.verify.plans import plans
from onnx_tricks.verify.tally import counted


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def stack(model: onnx.ModelProto) -> None:
    """Write past_0 [2, B, H, P, K] and present_0 for the keys and values of layer 0, and so on."""
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.output)}
    for name, number in (("first", 0), ("second", 1), ("front", [0])):
        graph.initializer.append(numpy_helper.from_array(np.array(number), name))
    layers = sum(value.name.endswith(".key") for value in graph.input)
    for layer in range(layers):
        before, after = f"past_key_values.{layer}", f"present.{layer}"
        for found, start, name in ((graph.input, before, "past"), (graph.output, after, "present")):
            shape = [2, *dims(values[f"{start}.key"])]
            found.append(helper.make_tensor_value_info(f"{name}_{layer}", 1, shape))
            for slot in ("key", "value"):
                found.remove(values[f"{start}.{slot}"])
        for slot, index in (("key", "first"), ("value", "second")):
            inputs, outputs = [f"past_{layer}", index], [f"{before}.{slot}"]
            graph.node.insert(0, helper.make_node("Gather", inputs, outputs, axis=0))
            inputs, outputs = [f"{after}.{slot}", "front"], [f"{after}.{slot}.stacked"]
            graph.node.append(helper.make_node("Unsqueeze", inputs, outputs))
        both = [f"{after}.{slot}.stacked" for slot in ("key", "value")]
        graph.node.append(helper.make_node("Concat", both, [f"present_{layer}"], axis=0))
    onnx.checker.check_model(model)


@pytest.fixture
def stacked(demo, edited, tmp_path):
    return edited(demo["fp32"], stack).rename(tmp_path / "stacked.onnx")


def test_stacked_caches_have_their_rows_on_the_second_axis(stacked) -> None:
    interface = read_interface(load_model(stacked).model)
    cases = next(plans(interface, lambda _name, _batch: None))
    assert [case.batch for case in cases] == [1, 2, 2]
    shapes = [case.caches["past_3"].shape for case in cases]
    assert shapes == [(2, 1, 6, 0, 32), (2, 2, 6, 0, 32), (2, 2, 6, 0, 32)]


def test_a_batch_that_is_fixed_behind_the_stack_is_kept(stacked, edited) -> None:
    def fix(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name.startswith("past"):
                value.type.tensor_type.shape.dim[1].dim_value = 3

    interface = read_interface(load_model(edited(stacked, fix)).model)
    cases = next(plans(interface, lambda _name, _batch: None))
    assert {case.batch for case in cases} == {3}
    assert cases[0].caches["past_0"].shape == (2, 3, 6, 0, 32)


def test_decoding_with_stacked_caches_is_verified(stacked, edited) -> None:
    result = verify(stacked, stacked)
    assert (result.status, result.reference, result.cases) == ("passed", "float64", 3)
    assert {finding.phase for finding in result.findings} == {"prompt", "step"}

    def scale(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "past_1" in node.input)
        node.input[0] = "scaled"
        model.graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), "more"))
        model.graph.node.insert(0, helper.make_node("Mul", ["past_1", "more"], ["scaled"]))

    result = verify(stacked, edited(stacked, scale))
    assert {found.phase for found in result.findings if not found.passed} == {"step"}


def test_given_prompts_and_steps_take_stacked_caches(stacked) -> None:
    empty = {f"past_{layer}": np.zeros((2, 3, 6, 0, 32)) for layer in range(4)}
    prompt = {
        "input_ids": np.arange(12).reshape(3, 4),
        "attention_mask": np.ones((3, 4)),
        "position_ids": np.tile(np.arange(4), (3, 1)),
    }
    outputs = Session(stacked).run({**prompt, **empty})
    step = {
        "input_ids": np.ones((3, 1)),
        "attention_mask": np.ones((3, 5)),
        "position_ids": np.full((3, 1), 4),
        **{f"past_{layer}": outputs[f"present_{layer}"] for layer in range(4)},
    }
    result = verify(stacked, stacked, inputs=[prompt, step])
    assert (result.status, result.cases, result.given) == ("passed", 5, 2)


def test_padding_in_stacked_caches_does_not_count() -> None:
    valid = np.array([[False, True, True], [True, True, True]])
    mask = counted(np.empty((2, 2, 6, 3, 32)), Step({}, valid, 3))
    assert mask.shape == (1, 2, 1, 3, 1)
    assert (mask[0, :, 0, :, 0] == valid).all()


def test_padding_in_caches_of_as_many_heads_as_tokens_does_not_count() -> None:
    valid = np.array([[False, True, True], [True, True, True]])
    mask = np.broadcast_to(counted(np.empty((2, 3, 3, 32)), Step({}, valid, 3)), (2, 3, 3, 32))
    assert not mask[0, :, 0].any()
    assert mask[0, 1:, 1:].all()
    assert mask[1].all()

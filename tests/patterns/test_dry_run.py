"""Sizes that a dry run chooses."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.patterns.dry_run import BATCH, DryRun


def _shapes(*groups: int) -> list[tuple[int, ...] | None]:
    """The shapes of an input's rows put together in groups, and of the input itself."""
    constants = "".join(f"int64[3] s{one} = {{-1, {one}, 2}}, " for one in groups).rstrip(", ")
    nodes = "".join(f"y{one} = Reshape(x, s{one}) " for one in groups)
    outputs = ", ".join(f"float[a{one}, {one}, 2] y{one}" for one in groups)
    model = ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[rows, 2] x) => ({outputs}, float[rows, 2] z) <{constants}>
        {{ {nodes} z = Identity(x) }}
        """
    )
    run = DryRun(model)
    return [run.shape(value) for value in model.graph.outputs]


def test_an_input_has_as_many_rows_as_its_groups_take() -> None:
    assert _shapes(4) == [(2, 4, 2), (8, 2)]


def test_rows_that_no_number_fits_leave_the_rest_of_the_model_known() -> None:
    *_, whole = _shapes(4, 3)
    assert whole is not None


def test_the_rows_of_a_cache_that_stacks_keys_and_values_are_those_of_the_batch() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        g (int64[b, s] ids, float[2, b, 4, past, 12] cache) => (float y) { y = ReduceMax(cache) }
        """
    )
    run = DryRun(model)
    ids, cache = (run.shape(value) for value in model.graph.inputs)
    assert ids is not None
    assert cache is not None
    assert (ids[0], cache[1]) == (BATCH, BATCH)

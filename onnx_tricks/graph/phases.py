"""Decoders exported in two files: one for the prompt, and one for the steps after it.

The file for steps has lost the weights that make keys and values of encoder states, so whoever
changes caches needs both. Exporters may merge them into a third, in which an `If` holds the two;
where they have not, it is done here.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model

__all__ = ["MERGED", "PHASES", "PROMPT", "STEP", "merge_phases", "merged_decoder"]

PROMPT, STEP = "decoder_model.onnx", "decoder_with_past_model.onnx"
MERGED = "decoder_model_merged.onnx"
PHASES = (PROMPT, STEP, MERGED)
_FLAG = "use_cache_branch"


@contextlib.contextmanager
def merged_decoder(folder: Path) -> Iterator[Path | None]:
    """Give the file of a folder that holds both phases, made for the while where it is not there.

    Args:
        folder: Of an export; what lies beside the decoder is found beside the file that is given.

    Yields:
        The file; None where the folder holds no decoder in two phases.
    """
    if (folder / MERGED).is_file():
        yield folder / MERGED
    elif (folder / PROMPT).is_file() and (folder / STEP).is_file():
        with tempfile.TemporaryDirectory(prefix="onnx-tricks-") as name:
            for path in folder.resolve().iterdir():
                (Path(name) / path.name).symlink_to(path)
            merged = merge_phases(
                load_model(folder / PROMPT).model, load_model(folder / STEP).model
            )
            save_model(merged, Path(name) / MERGED)
            yield Path(name) / MERGED
    else:
        yield None


def merge_phases(prompt: ir.Model, step: ir.Model) -> ir.Model:
    """Merge the two phases of a decoder into one model.

    Args:
        prompt: Takes no caches and returns all of them; it is used up.
        step: Takes caches and returns those that grow; it is used up.

    Returns:
        A model with the inputs of both and `use_cache_branch`, true for a step. It returns what
        `prompt` does; caches that do not grow pass through.
    """
    inputs = {v.name: v for v in prompt.graph.inputs} | {
        v.name: v for v in step.graph.inputs if v.name not in {i.name for i in prompt.graph.inputs}
    }
    flag = ir.Value(name=_FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    outer = {
        name: ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in inputs.items()
    }
    weights = _Weights()
    names = [value.name or "" for value in prompt.graph.outputs]
    branches = [
        _branch(model.graph, outer, weights, names, label)
        for model, label in ((step, "with_past"), (prompt, "no_past"))
    ]
    node = ir.Node(
        "",
        "If",
        [flag],
        [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])],
        num_outputs=len(names),
        name="decoder",
    )
    for output, like in zip(node.outputs, branches[1].outputs, strict=True):
        output.name, output.shape, output.type = like.name, like.shape, like.type
    graph = ir.Graph(
        [*outer.values(), flag],
        node.outputs,
        nodes=[node],
        initializers=weights.values,
        opset_imports={**step.opset_imports, **prompt.opset_imports},
        name="merged",
    )
    functions = {**prompt.functions, **step.functions}.values()
    return ir.Model(
        graph, ir_version=max(prompt.ir_version, step.ir_version), functions=list(functions)
    )


class _Weights:
    """Initializers of both phases, equal ones kept once."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], ir.Value] = {}
        self._names: set[str] = set()

    @property
    def values(self) -> list[ir.Value]:
        return list(self._found.values())

    def add(self, value: ir.Value) -> ir.Value:
        """The outer initializer that stands for an inner one."""
        tensor = value.const_value
        assert tensor is not None
        digest = hashlib.sha256(memoryview(tensor.tobytes())).digest()
        key = (tensor.dtype, tuple(tensor.shape.numpy()), digest)
        if key not in self._found:
            name = value.name or "weight"
            while name in self._names:
                name = f"{name}_"
            self._names.add(name)
            self._found[key] = ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._found[key]


def _branch(
    graph: ir.Graph,
    inputs: dict[str | None, ir.Value],
    weights: _Weights,
    outputs: Iterable[str],
    label: str,
) -> ir.Graph:
    """Turn a graph into a branch that reads the inputs and weights of the graph around it."""
    for value in graph.inputs:
        value.replace_all_uses_with(inputs[value.name])
    for value in list(graph.initializers.values()):
        value.replace_all_uses_with(weights.add(value))
    nodes = list(graph)
    found = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    graph.remove(nodes)
    results = []
    for name in outputs:
        if name not in found:
            # A cache that does not grow.
            past = _past(name, inputs)
            node = ir.Node("", "Identity", [past], num_outputs=1, name=f"{label}/{name}")
            found[name] = node.outputs[0]
            found[name].name, found[name].shape, found[name].type = name, past.shape, past.type
            nodes.append(node)
        results.append(found[name])
    return ir.Graph([], results, nodes=nodes, name=label)


def _past(name: str, inputs: dict[str | None, ir.Value]) -> ir.Value:
    """The input that an output hands on as it is."""
    spelled = [name.replace("present", past) for past in ("past_key_values", "past")]
    found = next((inputs[one] for one in spelled if one in inputs), None)
    if found is None:
        raise ModelError(
            f"{PROMPT} returns {name!r}, which {STEP} neither returns nor takes as "
            f"{' or '.join(map(repr, spelled))}: export both phases of one decoder"
        )
    return found

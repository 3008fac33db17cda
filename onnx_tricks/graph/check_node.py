"""Whether a node has the operands and attributes that its operator asks for."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx

from onnx_tricks.errors import ModelError

__all__ = ["check_node"]


def check_node(node: onnx.NodeProto, opsets: Mapping[str, int], where: str) -> None:
    """Check a node against the schema of its operator, where onnx knows one.

    Operators of other domains pass, and so do attributes that a schema does not name: runtimes
    have their own.

    Args:
        node: The node.
        opsets: Imported operator sets, versions by domain; the default domain is "".
        where: What to call the node in messages.

    Raises:
        ModelError: Operands or required attributes are missing, or an attribute has a wrong type.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    schema = _schema(node.op_type, domain, opsets.get(domain, 0))
    if schema is None:
        return
    for kind, count, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            raise ModelError(f"{where} has {count} {kind}, which the operator cannot have")
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for name, parameter in zip(node.input, schema.inputs, strict=False):
        if not name and parameter.option == single:
            raise ModelError(f"{where} lacks the input {parameter.name!r}")
    given = {attribute.name: attribute for attribute in node.attribute}
    if schema.name == "Constant" and len(given.keys() & schema.attributes.keys()) != 1:
        raise ModelError(f"{where} must have exactly one value")
    for name, expected in schema.attributes.items():
        if name not in given:
            if expected.required:
                raise ModelError(f"{where} lacks the attribute {name!r}")
            continue
        kind = str(expected.type).rpartition(".")[2]
        if onnx.AttributeProto.AttributeType.Name(given[name].type) != kind:
            raise ModelError(f"attribute {name!r} of {where} is not of the type {kind}")


@functools.lru_cache(maxsize=1024)
def _schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None

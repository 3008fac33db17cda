"""What messages and reports call a node."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["described", "node_name"]


def node_name(node: ir.Node) -> str:
    """The name to look for: the node's own, else that of its first output, else its operator."""
    return node.name or node.outputs[0].name or node.op_type


def described(node: ir.Node) -> str:
    """The operator and the name of a node, for a sentence."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"

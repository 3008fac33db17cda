"""The way from heads back to where they come from: a linear layer, or an input of the graph.

On it lie, in any order that makes sense: views, numbers that scale, repeated heads, a cache, a
rotation and a norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.names import described
from onnx_tricks.graph.pasts import appended, is_lone, writes_buffer
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.head_norm import HeadNorms, NormPart
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.projection import linear_behind
from onnx_tricks.patterns.rotary import Rotary, find_rotary
from onnx_tricks.patterns.way_back import VIEWS

__all__ = ["Path", "Paths", "scale_between"]

_AFFINE = frozenset("Add Sub Mul Div".split())
_MAX_NODES = 80


@dataclasses.dataclass
class Path:
    """The way from an operand to its origin.

    Attributes:
        end: Where it ends: what a layer computes, rows to stop at, or what no node computes.
        linear: The linear layer at its end, if there is one.
        projected: Whether it ends in a layer or in rows.
        given: Values that labels pass by, each with the one that they continue in; and values at
            which nothing is rotated.
        appended: The past, what is appended to it, and the node that does it.
        rotary: The rotation that heads went through.
        rotated_last: Whether heads are cached before they are rotated.
        norms: The norm that heads went through, in parts.
        normed: The last value before heads are rotated or cached that is a norm of channels, apart
            from views: gain and shift are those with which it leaves.
        rotated_first: Whether the norm comes after the rotation.
        state: The first value that is cached, rotated or normalised, seen from the operand.
        below: What is cached, rotated or normalised, before all of that.
        views: The values down to `state`, latest first.
        shown: The values that are shown in another way since the last stage, latest first.
    """

    end: ir.Value
    linear: Linear | None = None
    projected: bool = False
    given: dict[ir.Value, ir.Value | Array] = dataclasses.field(default_factory=dict)
    appended: tuple[ir.Value, ir.Value, ir.Node] | None = None
    rotary: Rotary | None = None
    rotated_last: bool = False
    norms: Sequence[NormPart] = ()
    normed: ir.Value | None = None
    rotated_first: bool = False
    state: ir.Value | None = None
    below: ir.Value | None = None
    views: list[ir.Value] = dataclasses.field(default_factory=list)
    shown: list[ir.Value] = dataclasses.field(default_factory=list)

    def stage(self, source: ir.Value) -> None:
        """Go on to what has been cached, rotated or normalised to make the present end."""
        self.state = self.end if self.state is None else self.state
        self.below = self.end = source
        self.shown.clear()


class Paths:
    """Goes back from heads of one model."""

    def __init__(self, run: DryRun, norms: HeadNorms, rows: Collection[ir.Value] = ()) -> None:
        """Prepare for the heads of a model.

        Args:
            run: The dry run of the model.
            norms: Its norms.
            rows: Values to stop at: heads that are their channels have no layer of their own.
        """
        self._run, self._norms, self._rows = run, norms, rows
        self._projected = dict.fromkeys(rows, True)

    def back(self, value: ir.Value) -> Path | str:
        """Go back from a value; or say what stands in the way."""
        path = Path(value)
        for _ in range(_MAX_NODES):
            if path.state is None:
                path.views.append(path.end)
            rows, node = path.end in self._rows, path.end.producer()
            path.linear = None if rows else linear_behind(path.end)
            path.projected = rows or path.linear is not None
            if path.projected or node is None:
                return path
            obstacle = self._pass(node, path)
            if obstacle is not None:
                return obstacle
        return "the way from a projection to the heads is too long"

    def _pass(self, node: ir.Node, path: Path) -> str | None:
        """Go back past the node that computes the end of a path; or say why not."""
        norms = self._norms.read(path.end)
        if isinstance(norms, str):
            return norms
        if norms is not None:
            return _pass_norm(node, path, *norms)
        if writes_buffer(node):
            return f"{described(node)} writes into a cache of fixed length: export one that grows"
        joined = appended(node)
        if joined is not None:
            return _pass_cache(node, path, *joined)
        source = self._plain_source(node)
        if source is None:
            return self._pass_rotation(node, path)
        if node.op_type in _AFFINE:
            path.given[path.end] = source
        path.shown.append(path.end)
        path.end = source
        return None

    def _pass_rotation(self, node: ir.Node, path: Path) -> str | None:
        rotary = find_rotary(self._run, path.end, self._comes_from_a_layer)
        if rotary is not None and rotary.width == 2:
            # Perhaps pairs have an axis of their own for a while: what is shown whole tells.
            for shown in path.shown:
                whole = find_rotary(self._run, shown, self._comes_from_a_layer)
                if whole is not None and whole.width > 2:
                    path.end, rotary = shown, whole
                    break
        if rotary is None:
            if node.op_type == "Concat":
                return f"{described(node)} joins channels that do not come from one projection"
            return f"{described(node)} is not understood between a projection and the heads"
        if path.rotary is not None:
            return f"{described(node)} rotates heads that are rotated again"
        path.rotary = rotary
        path.rotated_first = bool(path.norms)
        path.given.update(rotary.idle)
        path.stage(rotary.source)
        return None

    def _plain_source(self, node: ir.Node) -> ir.Value | None:
        """What a node shows in another way, or scales or shifts by what is known."""
        if node.domain != "":
            return None
        if node.op_type in VIEWS or is_lone(node):
            return node.inputs[0]
        if node.op_type in _AFFINE and len(node.inputs) == 2:
            known = [is_constant(v) or self._run.array(v) is not None for v in node.inputs]
            if known.count(True) == 1 and not (known[0] and node.op_type == "Div"):
                return node.inputs[known.index(False)]
        return None

    def _comes_from_a_layer(self, value: ir.Value) -> bool:
        """Whether a value is heads on their way from a projection, and not an angle."""
        if value not in self._projected:
            self._projected[value] = False  # of a loop, which there is none
            self._projected[value] = self._look_back(value)
        return self._projected[value]

    def _look_back(self, value: ir.Value) -> bool:
        if self._norms.read(value) is not None or linear_behind(value) is not None:
            return True
        node = value.producer()
        if node is None or node.domain != "":
            return node is not None and node.op_type == "RotaryEmbedding"
        if appended(node) is not None or node.op_type == "RotaryEmbedding":
            return True
        if node.op_type in {*VIEWS, "Clip", "Neg"}:
            operands = node.inputs[:1]
        elif node.op_type in {*_AFFINE, "Concat"}:
            operands = node.inputs
        else:
            return False
        return any(one is not None and self._comes_from_a_layer(one) for one in operands)


def _pass_norm(
    node: ir.Node, path: Path, parts: Sequence[NormPart], source: ir.Value
) -> str | None:
    if path.norms:
        return f"{described(node)} is a second norm of one head"
    path.norms = parts
    path.given |= {one.output: one.source for one in parts}
    path.normed = path.below or path.end
    path.stage(source)
    return None


def _pass_cache(node: ir.Node, path: Path, past: ir.Value, new: ir.Value) -> str | None:
    if path.appended is not None:
        return f"{described(node)} appends to a cache that is appended to again"
    path.appended = past, new, node
    path.given[path.end] = new
    path.rotated_last = path.rotary is not None
    path.stage(new)
    return None


def scale_between(run: DryRun, value: ir.Value, state: ir.Value) -> float | None:
    """The number that a value is times another one, apart from views; None where it is none.

    Raises:
        Unknown: The shape of `state` or an operator between them is not known.
    """
    shape = run.shape(state)
    if shape is None:
        raise Unknown(f"the shape of {state.name!r} is unknown")
    zeros = run.replay(value, {state: np.zeros(shape)})
    ones = run.replay(value, {state: np.ones(shape)})
    if np.any(zeros) or ones.size == 0 or np.any(ones != ones.flat[0]):
        return None
    return float(ones.flat[0])

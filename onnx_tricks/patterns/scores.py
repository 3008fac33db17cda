"""What happens to attention scores between the product with the keys and the softmax.

Whatever the operators, the softmax reads
`cap(scale * q k^T)` (cap where there is one), to which terms are added and in which some entries
are replaced.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.names import described
from onnx_tricks.patterns.contraction import Product, find_product
from onnx_tricks.patterns.dry_run import DryRun

__all__ = ["Bias", "Mask", "Scores", "find_scores"]

_VIEWS = frozenset("Flatten Reshape Squeeze Unsqueeze".split())
_SAME = frozenset("Cast Dropout Identity".split())
_MAX_NODES = 30


@dataclasses.dataclass(frozen=True)
class Bias:
    """A term added to the scores: `scale * value`.

    Attributes:
        value: The term.
        scale: A factor.
        view: The shape of the scores to which it is added, where that is not that of the softmax:
            the node that reshapes them after.
    """

    value: ir.Value
    scale: float
    view: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class Mask:
    """Scores replaced where a condition holds.

    Attributes:
        condition: A boolean value.
        holds: Whether scores are replaced where the condition is true; else where it is false.
        fill: What they are replaced by, to be multiplied with `scale`.
        scale: A factor.
        view: As in `Bias`.
    """

    condition: ir.Value
    holds: bool
    fill: ir.Value
    scale: float
    view: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the softmax reads.

    Attributes:
        scale: The number by which the product of the operands is multiplied first.
        softcap: c of `c * tanh(scores / c)`, which comes next; None where scores are not capped.
        terms: What is added or replaced after that, in this order.
        floor: The least value that a score can have, where they are clipped from below.
        causal: Whether a fused operator masks later tokens by itself.
        window: How many tokens back a fused operator lets a token see; None for all.
        lengths: For GroupQueryAttention, the lengths of the sequences less one, [B].
        padding: For MultiHeadAttention and Attention, which keys count, [B, S] or a length [B].
        dtype: The type in which the softmax is computed.
    """

    scale: float = 1.0
    softcap: float | None = None
    terms: tuple[Bias | Mask, ...] = ()
    floor: float | None = None
    causal: bool = False
    window: int | None = None
    lengths: ir.Value | None = None
    padding: ir.Value | None = None
    dtype: ir.DataType | None = None


def find_scores(run: DryRun, softmax: ir.Node) -> tuple[Scores, Product] | str | None:
    """Read what a softmax over the last axis reads; None where no product of activations is in it.

    A text is the reason why scores are not understood.
    """
    value = softmax.inputs[0]
    assert value is not None
    walk = _Walk(run)
    product = walk.back(value)
    if product is None:
        return walk.reason if walk.reason and walk.reaches(value) else None
    found = walk.scores(product)
    if isinstance(found, str):
        return found
    return dataclasses.replace(found, dtype=softmax.outputs[0].dtype or value.dtype), product


class _Walk:
    """Goes back from the softmax to the product, noting what is done to the scores."""

    def __init__(self, run: DryRun) -> None:
        self.run, self.reason = run, ""
        self.steps: list[tuple[str, object, ir.Node]] = []

    def back(self, value: ir.Value) -> Product | None:
        for _ in range(_MAX_NODES):
            node = value.producer()
            if node is None:
                return None
            product = find_product(node)
            if product is not None:
                return product
            step = self._step(node)
            if step is None:
                self.reason = self.reason or f"{described(node)} changes the scores"
                return None
            value = step
        return None

    def reaches(self, value: ir.Value) -> bool:
        """Whether a product of activations lies a few nodes behind a value."""
        pending, seen = [(value, 0)], {value}
        while pending:
            value, depth = pending.pop()
            node = value.producer()
            if node is None or depth > 8:
                continue
            if find_product(node) is not None or node.op_type == "Einsum":
                return True
            if node.op_type in ("Gemm", "LayerNormalization", "Gather", "Conv", "MatMul"):
                continue
            for one in node.inputs:
                if one is not None and one not in seen:
                    seen.add(one)
                    pending.append((one, depth + 1))
        return False

    def scores(self, product: Product) -> Scores | str:
        scale, softcap, floor = product.scale, None, None
        terms: list[Bias | Mask] = []
        steps = self.steps[::-1]
        place = 0
        while place < len(steps):
            kind, what, node = steps[place]
            if kind == "scale":
                assert isinstance(what, float)
                if softcap is not None or floor is not None:
                    return f"{described(node)} scales scores that have been capped"
                scale *= what
                terms = [dataclasses.replace(one, scale=one.scale * what) for one in terms]
            elif kind == "tanh":
                cap = steps[place + 1][1] if place + 1 < len(steps) else None
                if not isinstance(cap, float) or terms or softcap is not None:
                    return f"{described(node)} squashes the scores"
                # cap tanh(s x) is s cap x, capped
                scale, softcap, place = scale * cap, cap, place + 1
            elif kind == "view":
                terms = [one if one.view else dataclasses.replace(one, view=node) for one in terms]
            elif kind == "floor":
                assert isinstance(what, float)
                floor = what
            else:
                assert isinstance(what, Bias | Mask)
                if floor is not None:
                    return f"{described(node)} adds to scores that have been clipped"
                terms.append(what)
            place += 1
        return Scores(scale, softcap, tuple(terms), floor)

    def _step(self, node: ir.Node) -> ir.Value | None:
        operands = [operand for operand in node.inputs if operand is not None]
        if node.domain != "" or not operands:
            return None
        kind = node.op_type
        if kind in _SAME:
            return operands[0]
        if kind in _VIEWS:
            self.steps.append(("view", None, node))
            return operands[0]
        if kind == "Tanh":
            self.steps.append(("tanh", None, node))
            return operands[0]
        if kind in ("Mul", "Div"):
            return self._scale(node, operands)
        if kind in ("Add", "Sub"):
            return self._bias(node, operands)
        if kind == "Where":
            return self._mask(node, operands)
        if kind == "Max":
            numbers = [self.run.number(one) for one in operands]
            if len(operands) == 2 and numbers.count(None) == 1:
                self.steps.append(("floor", next(n for n in numbers if n is not None), node))
                return operands[numbers.index(None)]
        if kind == "Clip" and len(operands) == 2:
            number = self.run.number(operands[1])
            if number is not None:
                self.steps.append(("floor", number, node))
                return operands[0]
        return None

    def _scale(self, node: ir.Node, operands: list[ir.Value]) -> ir.Value | None:
        numbers = [self.run.number(one) for one in operands]
        if numbers.count(None) != 1 or (node.op_type == "Div" and numbers[0] is not None):
            return None
        (number,) = (one for one in numbers if one is not None)
        self.steps.append(("scale", number if node.op_type == "Mul" else 1 / number, node))
        return operands[numbers.index(None)]

    def _bias(self, node: ir.Node, operands: list[ir.Value]) -> ir.Value | None:
        found = [self._holds_product(one) for one in operands]
        if found.count(True) != 1:
            if all(found):
                self.reason = f"{described(node)} adds up scores of several products"
            return None
        rest = operands[found.index(False)]
        if node.op_type == "Sub":
            if found[1]:
                return None
            if _is_row_maximum(rest, operands[0]):
                return operands[0]
        self.steps.append(("term", Bias(rest, -1.0 if node.op_type == "Sub" else 1.0), node))
        return operands[found.index(True)]

    def _mask(self, node: ir.Node, operands: list[ir.Value]) -> ir.Value | None:
        condition, first, second = operands
        found = [self._holds_product(one) for one in (first, second)]
        if found.count(True) != 1:
            return None
        holds = found[1]
        fill = first if holds else second
        self.steps.append(("term", Mask(condition, holds, fill, 1.0), node))
        return second if holds else first

    def _holds_product(self, value: ir.Value) -> bool:
        walk = _Walk(self.run)
        found = walk.back(value) is not None
        self.reason = self.reason or (walk.reason if "several" in walk.reason else "")
        return found


def _is_row_maximum(value: ir.Value, scores: ir.Value) -> bool:
    """Whether a value is the largest of each row, which a softmax does not notice."""
    node = value.producer()
    return node is not None and node.op_type == "ReduceMax" and node.inputs[0] is scores

"""The form of each operator: one for all layers of a model that it takes the place of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from onnx_tricks.operators.signature import INPUTS, Form, KeyNorm
from onnx_tricks.patterns.head_norm import HeadNorm
from onnx_tricks.rewrite import Skip
from onnx_tricks.slim.masks import masks_inside
from onnx_tricks.slim.plan import LayerPlan

__all__ = ["counts", "form_of", "sharing"]


def sharing(plans: Iterable[LayerPlan]) -> Iterator[LayerPlan | Skip]:
    """Yield the plans that can share their operator with the first that has it.

    Args:
        plans: Plans of layers of one model.

    Yields:
        Each plan, or why its layer stays as it is.
    """
    first: dict[str, LayerPlan] = {}
    for plan in plans:
        other = first.setdefault(plan.operator, plan)
        pairs = zip(_traits(plan).items(), _traits(other).values(), strict=True)
        apart = [name for (name, one), another in pairs if one != another]
        if apart:
            yield Skip(
                plan.layer.label,
                f"it differs from {other.layer.label!r} in {', '.join(apart)}, and layers of one "
                "model share an operator",
            )
        else:
            yield plan


def _traits(plan: LayerPlan) -> dict[str, object]:
    """What a form says once for all layers."""
    view = plan.layer.view
    rotary, norm = view.keys.rotary, view.keys.norm
    return {
        "its type": (plan.dtype, plan.cache),
        "the rotation of its keys": None if rotary is None else rotary.interleaved,
        "the norm of its keys": (_scope(norm), isinstance(norm, HeadNorm) and norm.centered),
        "the cap of its scores": view.scores.softcap is None,
    }


def _scope(norm: HeadNorm | str | None) -> KeyNorm:
    return "" if not isinstance(norm, HeadNorm) else "heads" if norm.whole else "head"


def form_of(plans: Iterable[LayerPlan], opset: int) -> dict[str, Form]:
    """The form of each operator, wide enough for all layers that it takes the place of."""
    groups: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.operator, []).append(plan)
    return {operator: _common(operator, group, opset) for operator, group in groups.items()}


def _common(operator: str, plans: list[LayerPlan], opset: int) -> Form:
    views = [view for plan in plans for view in plan.layer.views]
    rotary, norm = plans[0].layer.view.keys.rotary, plans[0].layer.view.keys.norm
    optional = {
        "cos": rotary is not None,
        "sin": rotary is not None,
        "residual": any(plan.rank for plan in plans),
        "past_residual": any(plan.rank for plan in plans),
        "key_gain": norm is not None,
        "bias": any(view.scores.terms or masks_inside(view) for view in views),
        **{
            name: any(name in plan.weights and counts(plan.weights[name]) for plan in plans)
            for name in ("key_bias", "value_bias", "key_shift")
        },
    }
    return Form(
        opset=opset,
        dtype=plans[0].dtype,
        cache=plans[0].read,
        inputs=frozenset(name for name in INPUTS[operator] if optional.get(name, True)),
        softcap=plans[0].layer.view.scores.softcap is not None,
        interleaved=rotary is not None and rotary.interleaved,
        safe=any(view.safe for view in views),
        norm=_scope(norm),
        centered=isinstance(norm, HeadNorm) and norm.centered,
    )


def counts(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant changes anything that it is added to."""
    return bool(np.any(tensor.numpy()))

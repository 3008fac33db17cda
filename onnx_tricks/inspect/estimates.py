"""Tricks as the dimensions of a model tell of them, where no pass can be tried."""

from __future__ import annotations

from collections.abc import Collection

from onnx_tricks.inspect.cost import ESTIMATES, Change, Refusal
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.inspection import Inspection, Trick
from onnx_tricks.inspect.traffic import Amount, Traffic
from onnx_tricks.rewrite import Skip

__all__ = ["combine", "estimate_otherwise", "estimate_tricks"]

_NO_CONFIG = "only a config.json of a known model_type beside the model tells"


def estimate_tricks(
    dims: Dimensions | None, traffic: Traffic, without: Collection[str] = ()
) -> list[Trick]:
    """Estimate all tricks but those whose pass was tried.

    Args:
        dims: The dimensions, as far as they are known.
        traffic: What a step reads today.
        without: Names of the tricks to leave out.
    """
    return [_estimate(name, dims, traffic) for name in ESTIMATES if name not in without]


def combine(inspection: Inspection, traffic: Traffic) -> Traffic:
    """What a step reads after the estimated tricks that join in, on top of what passes leave.

    Tricks that touch the same weights are counted each by itself: the sum is right to within the
    first layer.
    """
    dims = inspection.dimensions
    for trick in inspection.tricks:
        if trick.basis == "estimate" and inspection.joins(trick) and dims is not None:
            change = ESTIMATES[trick.name](dims)
            assert isinstance(change, Change)
            traffic = change.applied_to(traffic, dims)
    return traffic


def estimate_otherwise(name: str, dims: Dimensions | None) -> Change | None:
    """What a trick that does not apply would change in a model of the same dimensions."""
    told = ESTIMATES[name](dims) if dims is not None and dims.model_type else None
    return told.otherwise if isinstance(told, Refusal) else None


def _estimate(name: str, dims: Dimensions | None, traffic: Traffic) -> Trick:
    told: Change | Refusal = Refusal(_NO_CONFIG)
    # The graph alone tells the widths of the caches and no more.
    if dims is not None and (dims.model_type or name == "slim-attention"):
        told = ESTIMATES[name](dims)
    if isinstance(told, Change):
        assert dims is not None
        return Trick(
            name,
            "estimate",
            applies=True,
            where=(told.where,),
            removed=dims.weights(told.removed),
            added=dims.weights(told.added),
            traffic=told.applied_to(traffic, dims),
            notes=told.notes,
        )
    skip = Skip(dims.model_type if dims else "", told.reason)
    return Trick(
        name,
        "estimate",
        applies=False,
        skipped=(skip,),
        removed=Amount(),
        added=Amount(),
        traffic=traffic,
        otherwise=told.otherwise,
    )

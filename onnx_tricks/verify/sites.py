"""Compare two models region by region, each cut out of both, in the memory of one region."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate, dtype_of, shape_of
from onnx_tricks.rewrite import Site
from onnx_tricks.runtime.sessions import Array, Session, SessionError
from onnx_tricks.verify.cases import Step
from onnx_tricks.verify.pair import CandidateError, NotComparable
from onnx_tricks.verify.plans import plans
from onnx_tricks.verify.reference import CannotRaise, raise_to_double
from onnx_tricks.verify.tally import Tally
from onnx_tricks.verify.whole import Comparison

__all__ = ["compare_sites"]

_Feeds = dict[str, Array]


def compare_sites(
    reference: Path,
    candidate: Path,
    sites: Sequence[Site],
    progress: Callable[[str], None],
) -> Comparison:
    """Compare the rewritten regions of two models on random activations.

    Args:
        reference: The original model.
        candidate: The rewritten model.
        sites: The regions; each names the values that bound it.
        progress: Told which region comes next.

    Returns:
        The errors of every region's outputs, against that region in float64.

    Raises:
        NotComparable: A region of the original does not run alone.
        CandidateError: A region of the candidate does not run.
    """
    before, after = _Regions(reference), _Regions(candidate)
    tally = Tally()
    for index, site in enumerate(sites, 1):
        progress(f"comparing region {index} of {len(sites)} ({site.node})")
        try:
            expected = [_run_original(*region) for region in before.cut(site)]
        except (CannotRaise, NotComparable, SessionError) as error:
            raise NotComparable(f"the region of {site.node} does not run alone: {error}") from error
        try:
            regions = after.cut(site)
            for (region, _), (step, right, ours) in zip(regions, expected, strict=True):
                theirs = Session(region).run(step.feeds)
                tally.add(site.node, "site", step, right, ours, theirs)
        except (NotComparable, SessionError, ValueError) as error:
            raise CandidateError(f"the region of {site.node} does not run: {error}") from error
    note = "too large to run whole: compared region by region"
    return Comparison("sites", tuple(tally.findings()), len(sites), 0, note)


def _run_original(region: ir.Model, feeds: _Feeds) -> tuple[Step, _Feeds, _Feeds]:
    """Run a region in float64 and in its own type."""
    ours = Session(region).run(feeds)
    raise_to_double(region)
    return Step(feeds), Session(region, optimised=False).run(feeds), ours


class _Regions:
    """Cuts regions out of one model."""

    def __init__(self, path: Path) -> None:
        self._model = load_model(path).model
        annotate(self._model)
        self._names = [
            (graph, frozenset(ir.convenience.create_value_mapping(graph, include_subgraphs=False)))
            for graph in self._model.graphs()
        ]
        interface = read_interface(self._model)
        cases = next(plans(interface, lambda _name, _batch: None))
        # Activations take the sizes of a case, so that they fit shapes made from its inputs.
        case = max(cases, key=lambda case: case.batch * case.steps[0].new)
        self._outer = {**case.caches, **case.steps[0].feeds}
        self._sizes = (case.batch, case.steps[0].new or 33, 7, 5)

    def cut(self, site: Site) -> list[tuple[ir.Model, _Feeds]]:
        """Cut a region out, its weights shared with the model, with inputs to run it on.

        Returns:
            One model and its inputs for each graph that holds a part of the region: branches of
            an If may share its weights, and may name their values alike.

        Raises:
            NotComparable: The values do not bound a region of this model.
        """
        # A value that a branch returns may have the name of what the If makes of it outside.
        owners = [
            graph
            for graph, names in self._names
            if not names.isdisjoint(site.inputs) and not names.isdisjoint(site.outputs)
        ]
        if not owners:
            raise NotComparable("the values around it are not in the model")
        return [self._cut(owner, site) for owner in owners]

    def _cut(self, owner: ir.Graph, site: Site) -> tuple[ir.Model, _Feeds]:
        known = ir.convenience.create_value_mapping(owner, include_subgraphs=False)
        inputs = [name for name in site.inputs if name in known]
        outputs = [name for name in site.outputs if name in known]
        # Shapes inside a region may be worked out from the inputs of the model.
        outer = [name for name in self._outer if name in known and name not in inputs]
        try:
            graph = ir.convenience.extract(owner, inputs, outputs)
        except ValueError:
            try:
                graph = ir.convenience.extract(owner, [*inputs, *outer], outputs)
            except ValueError as error:
                raise NotComparable(str(error)) from error
        graph.opset_imports.update(self._model.opset_imports)
        feeds = {}
        for value in list(graph.inputs):
            name = value.name or ""
            if value.is_initializer():
                continue
            if not value.uses():
                # Needed in the other branch, or not at all.
                graph.inputs.remove(value)
                continue
            if name in self._outer:
                feeds[name] = self._outer[name]
                continue
            shape, dtype = shape_of(known[name]), dtype_of(known[name])
            gain = _gain(value, graph)
            if gain is not None:
                shape, dtype = shape or ir.Shape([None, None, gain.size]), dtype or gain.dtype
            if shape is None or dtype is None or not dtype.is_floating_point():
                raise NotComparable(f"type or shape of {name} are not known")
            value.dtype = dtype
            feeds[name] = self._activation(name, shape, dtype)
        return ir.Model(graph, ir_version=self._model.ir_version), feeds

    def _activation(self, name: str, shape: ir.Shape, dtype: ir.DataType) -> Array:
        dims = [n if isinstance(n, int) else self._sizes[axis] for axis, n in enumerate(shape)]
        random = np.random.default_rng(zlib.crc32(name.encode()))
        array = random.standard_normal(dims).astype(np.float32)
        return array.astype(np.float16) if dtype == ir.DataType.FLOAT16 else array


def _gain(value: ir.Value, graph: ir.Graph) -> ir.TensorProtocol | None:
    """Find a vector as wide as what a norm reads, for where no shape was inferred."""
    near = [other for node, _ in value.uses() for other in node.inputs if other is not None]
    for others in (near, graph.initializers.values()):
        tensors = [other.const_value for other in others]
        vectors = [t for t in tensors if t is not None and len(t.shape) == 1 and t.size > 1]
        if vectors:
            return min(vectors, key=lambda tensor: tensor.size)
    return None

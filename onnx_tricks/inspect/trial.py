"""The passes tried on the graphs of a model, as a dry run does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.plan import find_models
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.graph.sizes import Sizes, measure
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.estimates import estimate_otherwise
from onnx_tricks.inspect.from_config import read_config
from onnx_tricks.inspect.from_onnx import (
    find_decode_step,
    graph_dimensions,
    graph_traffic,
    has_tied_head,
    item_bytes,
    keeps_cache,
)
from onnx_tricks.inspect.inspection import Trick
from onnx_tricks.inspect.traffic import Amount, Traffic
from onnx_tricks.optimizer import optimize
from onnx_tricks.rewrite import Pass, Site

__all__ = ["Trial"]


class Trial:
    """The ONNX files of one model, on which passes are tried.

    Attributes:
        stored: All weights of all files.
        step: The file that a decode step runs.
        dimensions: The dimensions, as far as they are known.
        traffic: What a step reads today.
        notes: What kept the config.json from being used.
    """

    def __init__(self, source: Path, config: Path | None, progress: Callable[[str], None]) -> None:
        """Read the files.

        Args:
            source: A .onnx file or a folder of them.
            config: The config.json or genai_config.json of the model.
            progress: Told what is being done.
        """
        self.source, self.progress = source, progress
        self.notes: list[str] = []
        self._models: dict[Path, ir.Model] = {}
        sizes: list[Sizes] = []
        for path in find_models(source):
            progress(f"reading {path.name}")
            model = load_model(path).model
            sizes.append(measure(model))
            self._models[path] = _inlined(model)
            annotate(self._models[path])
        total = sum(sizes[1:], start=sizes[0])
        self.stored = Amount(total.parameters, total.bytes)
        self.step = find_decode_step(self._models)
        self.dimensions = self._dimensions(config)
        self.traffic = self._reads(self._models[self.step])
        if self.dimensions is not None and not self.traffic.caches:
            self.dimensions = dataclasses.replace(self.dimensions, decodes=False)

    def try_pass(self, one: type[Pass]) -> Trick:
        """Try a pass on all files."""
        self.progress(f"trying {one.name}")
        done = optimize(self.source, None, passes=[one.name], dry_run=True)
        result = done.report.passes[0]
        before, after = done.report.before, done.report.after
        change = Amount(after.parameters - before.parameters, after.bytes - before.bytes)
        return Trick(
            one.name,
            "pass",
            applies=result.applied > 0,
            removed=Amount(max(-change.values, 0), max(-change.bytes, 0)),
            added=Amount(max(change.values, 0), max(change.bytes, 0)),
            traffic=self._reads(self._step_of(done.model)),
            where=tuple(self._nodes(one)) if result.applied else (),
            count=result.applied,
            skipped=tuple(result.skipped),
            otherwise=None if result.applied else estimate_otherwise(one.name, self.dimensions),
        )

    def try_together(self, tricks: list[Trick]) -> Traffic:
        """What a step reads after several passes."""
        if len(tricks) < 2:
            return tricks[0].traffic if tricks else self.traffic
        self.progress("trying all of them")
        names = [trick.name for trick in tricks]
        return self._reads(self._step_of(optimize(self.source, passes=names, dry_run=True).model))

    def _dimensions(self, config: Path | None) -> Dimensions | None:
        """The dimensions from the config where it fits the graph, else from the graph."""
        model = self._models[self.step]
        stated = None
        if config is not None:
            try:
                stated = read_config(config)
            except ModelError as error:
                self.notes.append(f"the graph alone was read: {error}")
        kept = graph_traffic(model).cache_per_token("self").values
        if stated is not None and kept not in (0, stated.traffic.cache_per_token("self").values):
            self.notes.append(f"the graph alone was read: its caches do not fit {config}")
            stated = None
        dims = stated or graph_dimensions(model)
        if dims is None:
            return None
        weight, cached = item_bytes(model)
        # A graph keeps all tokens, whatever window its masks leave.
        attention = dataclasses.replace(dims.attention, window=None, windowed=0)
        return dataclasses.replace(
            dims,
            attention=attention,
            tied=has_tied_head(model),
            weight_bytes=weight,
            cache_bytes=cached,
        )

    def _reads(self, model: ir.Model) -> Traffic:
        """What a step of the graph reads; widths that it leaves open are taken from the config."""
        dims = self.dimensions
        read = graph_traffic(model, dims.encoder.tokens if dims and dims.encoder else None)
        if not read.caches and dims is not None and keeps_cache(model):
            return dataclasses.replace(read, caches=dims.traffic.caches)
        return read

    def _nodes(self, one: type[Pass]) -> list[str]:
        found: list[str] = []
        for path, model in self._models.items():
            prefix = f"{path.name}: " if len(self._models) > 1 else ""
            sites = (site for site in one().sites(model) if isinstance(site, Site))
            found += [f"{prefix}{site.node}" for site in sites]
        return found

    def _step_of(self, after: ir.Model | Mapping[str, Any]) -> ir.Model:
        if not isinstance(after, Mapping):
            return _inlined(after)
        models = {Path(name): _inlined(model) for name, model in after.items()}
        return models[find_decode_step(models)]


def _inlined(model: ir.Model) -> ir.Model:
    if not model.functions:
        return model
    copied = model.clone()
    InlinePass()(copied)
    return copied

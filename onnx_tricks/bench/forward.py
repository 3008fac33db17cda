"""Timing a model without caches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.bench.files import Files
from onnx_tricks.bench.workload import Workload
from onnx_tricks.errors import ModelError
from onnx_tricks.runtime.sessions import Array, SessionError, load_runtime, running
from onnx_tricks.verify.plans import prompts

__all__ = ["Forward"]


class Forward:
    """A model that is run as a whole, with all its inputs bound.

    Args:
        files: Its file.
        options: ONNX Runtime's session options.
        providers: ONNX Runtime's execution providers.
        given: What it takes from an encoder, for one row.

    Raises:
        SessionError: ONNX Runtime refuses the model.
    """

    def __init__(
        self, files: Files, options: Any, providers: Sequence[str], given: Mapping[str, Array]
    ) -> None:
        self._interface, self._given = files.interfaces[0], given
        with running():
            self._session = load_runtime().InferenceSession(
                os.fspath(files.paths[0]), options, providers=list(providers)
            )
        self._device = "cuda" if "CUDA" in providers[0] else "cpu"

    def prepare(self, work: Workload) -> Callable[[], float]:
        """Get ready for a workload; a call of the result runs it and returns seconds.

        Raises:
            ModelError: The model does not do it.
            SessionError: ONNX Runtime fails.
        """
        refusal: Exception = ModelError("no inputs could be made for it")
        for case in prompts(self._interface, self._rows, work.batch, work.new):
            if case.batch != work.batch:
                raise ModelError(f"the model takes {case.batch} rows only")
            if work.new and case.steps[0].new != work.new:
                raise ModelError(f"the model takes {case.steps[0].new} tokens only")
            run = self._bind({**case.caches, **case.steps[0].feeds})
            try:
                run()
            except SessionError as error:
                refusal = error
            else:
                return run
        raise refusal

    def filled_by(self, _: Workload) -> str:
        """Nothing, as there are no caches: ""."""
        return ""

    def _rows(self, name: str, batch: int) -> Array | None:
        value = self._given.get(name)
        return None if value is None else np.repeat(value, batch, 0)

    def _bind(self, feeds: Mapping[str, Array]) -> Callable[[], float]:
        make = load_runtime().OrtValue.ortvalue_from_numpy_with_onnx_type
        binding, held = self._session.io_binding(), []
        for like in self._interface.inputs:
            array = np.ascontiguousarray(feeds[like.name], dtype=like.dtype.numpy())
            bits = array.view(np.uint16) if like.dtype == ir.DataType.BFLOAT16 else array
            held.append(make(bits, int(like.dtype)))
            binding.bind_ortvalue_input(like.name, held[-1])
        names = [output.name for output in self._session.get_outputs()]

        def run(_: object = held) -> float:
            # Bound anew, so that making the outputs is timed, as it is in a decoder.
            binding.clear_binding_outputs()
            for name in names:
                binding.bind_output(name, self._device)
            with running():
                start = time.perf_counter()
                self._session.run_with_iobinding(binding)
                return time.perf_counter() - start

        return run

"""What PyTorch computes in float64: a reference that shares no code with the product."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from onnx_tricks.models.preprocessors import preprocessors

__all__ = ["Arrays", "Part", "in_double", "norms_run", "parts"]

Arrays = Mapping[str, np.ndarray]


class _Double(TorchFunctionMode):
    """Takes float64 wherever code asks for float32, as norms and softmax of many models do."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        wide = {name: _widened(one) for name, one in (kwargs or {}).items()}
        return function(*map(_widened, args), **wide)


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextlib.contextmanager
def in_double(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let a model compute in float64 throughout, and without gradients."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Double():
            yield model.double()
    finally:
        torch.set_default_dtype(torch.float32)


def norms_run(model: PreTrainedModel, run: Callable[[], Any]) -> int:
    """How many norms over channels, each with weights of its own, take part in a run."""
    seen: set[torch.nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda one, *_: seen.add(one))
        for module in model.modules()
        if "LayerNorm" in type(module).__name__ or "RMSNorm" in type(module).__name__
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(any(True for _ in module.parameters(recurse=False)) for module in seen)


class Part:
    """A model, or the part of it that Optimum writes as a file of its own.

    Args:
        module: What is exported.
        config: How Optimum exports it.
    """

    def __init__(self, module: Any, config: Any) -> None:
        self.module, self._config = module, config

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs as Optimum makes them up for the export, two rows."""
        random.seed(seed)
        torch.manual_seed(seed)
        with preprocessors(self.module):
            made = self._config.generate_dummy_inputs(framework="pt")
        return {name: one.numpy() for name, one in made.items() if isinstance(one, torch.Tensor)}

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """What the part computes in float64 in the form in which it is exported."""
        with in_double(self.module), self._config.patch_model_for_export(self.module):
            outputs = self.module(**_tensors(inputs))
        return {name: one.numpy() for name, one in outputs.items() if isinstance(one, torch.Tensor)}


def parts(model: PreTrainedModel, task: str) -> dict[str, Part]:
    """The parts of a model by the stem of the file that Optimum writes."""
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the families
    from optimum.exporters.onnx.utils import _get_submodels_and_export_configs

    with preprocessors(model) as handed:
        _, found = _get_submodels_and_export_configs(
            model, task, False, {}, False, "default", "transformers", preprocessors=handed or None
        )
    return {name: Part(module, config) for name, (module, config) in found.items()}


def _tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(one) for name, one in inputs.items()}
    return {n: one.double() if one.is_floating_point() else one for n, one in tensors.items()}

"""What PyTorch computes in float64: a reference that shares no code with the product."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from optimum.utils import DEFAULT_DUMMY_SHAPES
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from onnx_tricks.models.dynamo import tensors_of
from onnx_tricks.models.preprocessors import preprocessors

__all__ = ["Arrays", "Part", "compute", "parts", "tensors"]

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


def compute(module: Any, run: Callable[[], Mapping[str, Any]]) -> tuple[Arrays, int]:
    """Let a model compute in float64 throughout.

    Args:
        module: The model, or a part of one; it stays in float64.
        run: Calls it.

    Returns:
        The outputs that are tensors, and how many norms over channels, each with weights of its
        own, these outputs depend on.
    """
    norms: dict[torch.nn.Module, torch.Tensor] = {}

    def note(one: torch.nn.Module, *_: Any) -> None:
        weights = [weight for weight in one.parameters(recurse=False) if weight.numel() > 1]
        norms.update(dict.fromkeys([one] * bool(weights), weights[0] if weights else None))

    hooks = [
        one.register_forward_hook(note)
        for one in module.modules()
        if "LayerNorm" in type(one).__name__ or "RMSNorm" in type(one).__name__
    ]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad(), _Double():
            module.double()
            outputs = tensors_of(run())
    finally:
        torch.set_default_dtype(torch.float32)
        for hook in hooks:
            hook.remove()
    return {name: one.detach().numpy() for name, one in outputs.items()}, _felt(outputs, norms)


def _felt(outputs: Mapping[str, torch.Tensor], norms: Mapping[Any, torch.Tensor]) -> int:
    """How many of some norms have a part in the outputs."""
    differentiable = [one for one in outputs.values() if one.requires_grad]
    if not norms or not differentiable:
        return len(norms)
    total = torch.stack([one.sum() for one in differentiable]).sum()
    slopes = torch.autograd.grad(total, list(norms.values()), allow_unused=True)
    return sum(slope is not None for slope in slopes)


class Part:
    """A model, or the part of it that Optimum writes as a file of its own.

    Args:
        module: What is exported.
        config: How Optimum exports it.
    """

    def __init__(self, module: Any, config: Any) -> None:
        self.module, self._config = module, config

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """What Optimum makes up for the export, two rows: tensors, and tuples of them."""
        random.seed(seed)
        torch.manual_seed(seed)
        with preprocessors(self.module):
            made = self._config.generate_dummy_inputs(framework="pt", **DEFAULT_DUMMY_SHAPES)
        return dict(made)

    def feeds(self, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        """The same for the file, by the names that it has for them."""
        found = self._config.generate_dummy_inputs_for_validation(dict(inputs), list(names))
        for name, one in list(found.items()):
            if isinstance(one, (list, tuple)):
                found |= self._config.flatten_output_collection_property(name, one)
        return {name: found[name].numpy() for name in names}

    def compute(self, inputs: Mapping[str, Any]) -> tuple[Arrays, int]:
        """What `compute` says of the part, in the form in which it is exported."""
        given = {name: _doubled(one) for name, one in inputs.items()}
        given = self._config.rename_ambiguous_inputs(given)
        with self._config.patch_model_for_export(self.module):
            return compute(self.module, lambda: self.module(**given))


def parts(model: PreTrainedModel, task: str) -> dict[str, Part]:
    """The parts of a model by the stem of the file that Optimum writes."""
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the families
    from optimum.exporters.onnx.utils import _get_submodels_and_export_configs

    with preprocessors(model) as handed:
        _, found = _get_submodels_and_export_configs(
            model, task, False, {}, False, "default", "transformers", preprocessors=handed or None
        )
    return {name: Part(module, config) for name, (module, config) in found.items()}


def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    """Inputs for a model in float64."""
    return {name: _doubled(torch.from_numpy(one)) for name, one in inputs.items()}


def _doubled(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return type(given)(map(_doubled, given))
    is_float = isinstance(given, torch.Tensor) and given.is_floating_point()
    return given.double() if is_float else given

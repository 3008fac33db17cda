"""Mixtures of experts without data-dependent loops, which no exporter can trace."""

from __future__ import annotations

import types

import torch
from transformers import PreTrainedModel

__all__ = ["make_experts_dense"]


def make_experts_dense(model: PreTrainedModel) -> None:
    """Lets every expert of Mixtral or Qwen MoE see every token, in place; the output is the same.

    Args:
        model: Any model; without such experts nothing changes.
    """
    for module in model.modules():
        if type(module).__name__ in {"MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock"}:
            module.forward = types.MethodType(_forward, module)


def _forward(self: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_e p_e expert_e(x)`` with ``p_e`` zero outside the top k; x is [batch, length, D]."""
    router = self.gate(states)
    weights, chosen = router.softmax(-1, dtype=torch.float).topk(self.top_k)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    spread = torch.zeros_like(router).scatter(-1, chosen, weights.to(states.dtype))
    output = torch.zeros_like(states)
    for i, expert in enumerate(self.experts):
        output = output + spread[..., i : i + 1] * expert(states)
    return output, router.flatten(0, 1)

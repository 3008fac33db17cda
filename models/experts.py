"""Mixtures of experts without data-dependent loops, which no exporter can trace."""

from __future__ import annotations

import types

import torch
from transformers import PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import sparsemixer

__all__ = ["make_experts_dense"]


def make_experts_dense(model: PreTrainedModel) -> None:
    """Lets every expert see every token, in place; the output is the same.

    Args:
        model: Any model; without experts that loop over their tokens nothing changes.
    """
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            module.forward = types.MethodType(_stacked, module)
        elif isinstance(getattr(module, "experts", None), torch.nn.ModuleList):
            if hasattr(module, "moe"):  # DeepSeek and its kin, which route elsewhere
                module.moe = types.MethodType(_mix, module)
            else:
                module.forward = types.MethodType(_forward, module)


def _forward(self: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Route, mix, and add what the shared experts say; states are [batch, length, D]."""
    router = self.gate(states)
    output = _mix(self, states, *_route(self, router))
    if hasattr(self, "shared_expert_gate"):
        output = output + self.shared_expert_gate(states).sigmoid() * self.shared_expert(states)
    if getattr(self, "shared_experts", None) is not None:
        output = output + self.shared_experts(states)
    return output, router.flatten(0, 1)


def _route(block: torch.nn.Module, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts chosen for each token, and their weights, both [..., k]."""
    if type(block).__name__ == "PhimoeSparseMoeBlock":
        weights, chosen = sparsemixer(router, jitter_eps=block.router_jitter_noise, training=False)
        return chosen, weights
    weights = router.softmax(-1, dtype=torch.float)
    if hasattr(block, "moe_statics"):  # Ernie: the choice is corrected, the weights are not
        chosen = block.moe_statics(weights).topk(block.top_k).indices
        weights = weights.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True).clamp(min=block.norm_min)
    weights, chosen = weights.topk(block.top_k)
    if getattr(block, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights


def _mix(
    self: torch.nn.Module, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``sum_e p_e expert_e(x)`` with ``p_e`` zero for the experts that are not chosen."""
    spread = states.new_zeros(*states.shape[:-1], len(self.experts))
    spread = spread.scatter(-1, chosen, weights.to(states.dtype))
    output = torch.zeros_like(states)
    for i, expert in enumerate(self.experts):
        output = output + spread[..., i : i + 1] * expert(states)
    return output


def _stacked(
    self: torch.nn.Module,
    states: torch.Tensor,
    router_indices: torch.Tensor,  # noqa: ARG001 - given by name
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """GPT-OSS, whose experts are one tensor; ``routing_weights`` are [batch * length, experts]."""
    rows = states.reshape(1, -1, states.shape[-1])
    both = rows @ self.gate_up_proj + self.gate_up_proj_bias[:, None]
    gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
    inner = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
    outputs = inner @ self.down_proj + self.down_proj_bias[:, None]
    mixed = (outputs * routing_weights.to(states.dtype).T[..., None]).sum(0)
    return mixed.view_as(states)

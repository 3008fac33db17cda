"""A decoder as people write one by hand, with caches, positions and masks in many styles."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Style", "write"]

WIDTH, HEADS, VOCABULARY, LAYERS, LONGEST = 32, 2, 41, 2, 300
HEAD = WIDTH // HEADS
BATCH, NEW, PAST = 2, 3, 5

# By the letters of a cache (b batch, h heads, s tokens, k channels): from [B, H, S, K].
_LAYOUTS = {"bhsk": (0, 1, 2, 3), "bshk": (0, 2, 1, 3), "sbhk": (2, 0, 1, 3), "bhks": (0, 1, 3, 2)}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a decoder is written.

    Attributes:
        layout: The axes of a cache; "bs(hk)" has the heads side by side.
        positions: "cache" counts what is cached; "first" is an input, the first new position, to
            which a range is added; "slice" one by which tables are sliced; "each" is [T].
        interleaved: Whether neighbours are turned as a pair, stacked and flattened.
        mask: "own", or an input: "bias" [T, S] is added, "allowed" [B, 1, T, S] is true or false.
        keeps: What leaves: "all" keys, the "new" ones alone, or a "buffer" that they are put into.
    """

    layout: str = "bhsk"
    positions: str = "cache"
    interleaved: bool = False
    mask: str = "own"
    keeps: str = "all"

    @property
    def axis(self) -> int:
        """The axis of tokens."""
        return self.layout.index("s")

    def cached(self, heads: Tensor) -> Tensor:
        """[B, H, S, K] as a cache has it."""
        if self.layout == "bs(hk)":
            return heads.transpose(1, 2).flatten(2)
        return heads.permute(_LAYOUTS[self.layout])

    def heads(self, cache: Tensor) -> Tensor:
        """A cache as [B, H, S, K]."""
        if self.layout == "bs(hk)":
            return cache.unflatten(2, (HEADS, HEAD)).transpose(1, 2)
        places = _LAYOUTS[self.layout]
        return cache.permute([places.index(axis) for axis in range(4)])


class Layer(nn.Module):
    """Attention and a feed-forward block."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.norm, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
        places: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        style, rows = self.style, self.norm(x)
        query, key, value = (
            layer(rows).unflatten(2, (HEADS, HEAD)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = (_turn(one, *angles, style.interleaved) for one in (query, key))
        news = style.cached(key), style.cached(value)
        if style.keeps == "buffer":
            kept = [
                cache.index_copy(style.axis, places, new)
                for cache, new in zip((keys, values), news, strict=True)
            ]
        else:
            kept = [
                torch.cat([cache, new], style.axis)
                for cache, new in zip((keys, values), news, strict=True)
            ]
        key, value = (style.heads(one) for one in kept)
        weights = (query @ key.transpose(2, 3) / HEAD**0.5 + mask).softmax(-1)
        x = x + self.output((weights @ value).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return x, *(news if style.keeps == "new" else kept)


class Decoder(nn.Module):
    """Token ids, what a style has for positions and a mask, and caches; logits and caches."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(style) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        angles = torch.outer(torch.arange(LONGEST), 100.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        rest, style = list(others), self.style
        place = rest.pop(0) if style.positions != "cache" else None
        given = rest.pop(0) if style.mask != "own" else None
        new, past = ids.shape[1], rest[0].shape[style.axis]
        places = torch.arange(past, past + new)
        if style.positions == "first":
            places = torch.arange(new) + place
        elif style.positions == "each":
            places = place
        angles = self.cos[places], self.sin[places]
        if style.positions == "slice":
            angles = self.cos[place : place + new], self.sin[place : place + new]
        if style.keeps == "buffer":
            ahead = torch.arange(past)[None] > places[:, None]
        else:
            ahead = torch.arange(past + new)[None] > torch.arange(past, past + new)[:, None]
        mask = torch.where(ahead, float("-inf"), 0.0)
        if given is not None:
            mask = given if style.mask == "bias" else torch.where(given, 0.0, -1e9)
        x, kept = self.table(ids), []
        for index, layer in enumerate(self.layers):
            x, *caches = layer(x, *rest[2 * index : 2 * index + 2], angles, mask, places)
            kept += caches
        return self.head(self.norm(x)), *kept


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        one, other = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([one * cos - other * sin, one * sin + other * cos], -1).flatten(-2)
    one, other = heads.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def write(style: Style, path: Path, *, dynamo: bool = False) -> Path:
    """Export a decoder of a style, with seeded weights.

    Args:
        style: The style.
        path: Where to.
        dynamo: Whether by torch.export, at opset 18; otherwise by TorchScript, at opset 17.
    """
    torch.manual_seed(0)
    model = Decoder(style).eval()
    past = 4 * PAST if style.keeps == "buffer" else PAST
    inputs = {"tokens": (torch.zeros(BATCH, NEW, dtype=torch.long), {0: "B", 1: "T"})}
    if style.positions == "each":
        inputs["places"] = torch.arange(PAST, PAST + NEW), {0: "T"}
    elif style.positions != "cache":
        inputs["start"] = torch.tensor(PAST), {}
    if style.mask == "bias":
        inputs["bias"] = torch.zeros(NEW, past + NEW), {0: "T", 1: "S"}
    elif style.mask == "allowed":
        inputs["allowed"] = torch.ones(BATCH, 1, NEW, past + NEW) > 0, {0: "B", 2: "T", 3: "S"}
    cache = style.cached(torch.zeros(BATCH, HEADS, past, HEAD))
    axes = {style.layout.index("b"): "B"} | ({style.axis: "P"} if style.keeps != "buffer" else {})
    outputs = ["logits"]
    for layer in range(LAYERS):
        for kind in "kv":
            inputs[f"{kind}_cache_{layer}"] = cache.clone(), axes
            outputs.append(f"{kind}_out_{layer}")
    values = tuple(value for value, _ in inputs.values())
    dynamic = {name: axes for name, (_, axes) in inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        names = {"input_names": list(inputs), "output_names": outputs, "dynamo": dynamo}
        if dynamo:
            unknown = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic.values()]
            shapes = unknown[0], tuple(unknown[1:])
            torch.onnx.export(
                model, values, path, **names, dynamic_shapes=shapes, opset_version=18, verbose=False
            )
        else:
            torch.onnx.export(model, values, path, **names, dynamic_axes=dynamic, opset_version=17)
    return path

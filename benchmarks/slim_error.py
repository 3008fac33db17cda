"""What slim attention costs in accuracy, and what a residual of r numbers per token gains.

The first tables give the error of values rebuilt from a cache that is rounded to a type, on real
activations of the demo model (trained, RoPE, as many key heads as heads) and of the decoder of
Whisper tiny.en. The last one simulates the whole forward pass of the demo model (see
`simulation.py`): 512 bytes of Python as the prompt, then 256 more one at a time, in a batch of four
of which two are padded on the left. The error of the logits against float64 is given as a multiple
of the error that the original model has in the same type.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from simulation import PROMPT, REFERENCE, Arithmetic, Llama, forward

from onnx_tricks.inverse import condition
from onnx_tricks.latent import ValueBasis, ValueSpectrum, value_spectrum

__all__ = ["main"]

Array = np.ndarray[Any, Any]
_STEPS = 256
_ROUNDS = 8
_TEXTS = {"argparse": 0, "textwrap": 0, "heapq": 100, "statistics": 300}
"""Modules of the standard library, and how many columns of padding stand before each."""

_RANKS = (0, 4, 8, 16, 32)
_TOLERANCES, _MULTIPLE = (8, 6, 4), 4
_BF16 = ml_dtypes.bfloat16
_TYPES = {"fp32": np.float32, "fp16": np.float16}  # bf16 is eight times fp16
_ARITHMETICS = (
    Arithmetic("fp32", np.float32, wide=True),
    Arithmetic("fp16", np.float16),
    Arithmetic("fp16, A jointly rounded", np.float16, joint=True),
    Arithmetic("fp16, p K in fp32", np.float16, wide=True),
    Arithmetic("fp16, p K in fp32, A jointly rounded", np.float16, wide=True, joint=True),
    Arithmetic("fp16, p K in fp32, A in fp32", np.float16, wide=True, exact=True),
    Arithmetic("bf16", _BF16),
    Arithmetic("bf16, p K in fp32, A jointly rounded", _BF16, wide=True, joint=True),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """The key and value projections of one attention block and inputs that it meets.

    Attributes:
        w_k: [D, E], with the gain of the norm folded in.
        w_v: [D, Ev], likewise.
        b_v: [Ev], with the bias of the norm folded in.
        inputs: [N, D], normalised, to measure on.
        sample: [N, D], to take means and sizes from.
    """

    w_k: Array
    w_v: Array
    b_v: Array
    inputs: Array
    sample: Array

    def error(self, basis: ValueBasis, dtype: Any) -> float:
        """The error of the values from a cache of this type, relative to their size."""

        def stored(x: Array) -> Array:
            return x.astype(dtype).astype("f8")

        exact = self.inputs @ self.w_v + self.b_v
        centred = self.inputs - basis.center
        rebuilt = (
            stored(centred @ self.w_k) @ basis.key_to_value
            + stored(centred @ basis.residual_weight) @ basis.residual_to_value
            + basis.value_bias
        )
        return float(np.linalg.norm(rebuilt - exact) / np.linalg.norm(exact))

    def floor(self, dtype: Any) -> float:
        """The error of values that are themselves stored in this type."""
        exact = self.inputs @ self.w_v + self.b_v
        return float(
            np.linalg.norm(exact.astype(dtype).astype("f8") - exact) / np.linalg.norm(exact)
        )


def demo_blocks(model: Llama, tokens: Array, padding: Array) -> Iterator[Block]:
    """The blocks of the folded demo model."""
    inputs, sample = _attention_inputs(model, tokens, padding), _sample(model)
    for layer, mine, random in zip(model.layers, inputs, sample, strict=True):
        yield Block(layer["k"], layer["v"], np.zeros(layer["v"].shape[1]), mine, random)


def whisper_blocks(cross: bool) -> Iterator[Block]:
    """The blocks of the decoder of Whisper tiny.en, on an artificial sound and random text."""
    import torch

    from onnx_tricks.models.trained import whisper_tiny_en

    model = whisper_tiny_en().double()
    layers = model.model.decoder.layers
    seen: dict[Any, list[Array]] = {}

    def keep(module: Any, _: Any, kwargs: Any) -> None:
        states = kwargs.get("key_value_states")
        states = kwargs["hidden_states"] if states is None else states
        seen.setdefault(module, []).append(states[0].numpy())

    blocks = [layer.encoder_attn if cross else layer.self_attn for layer in layers]
    norms = [model.model.encoder.layer_norm if cross else x.self_attn_layer_norm for x in layers]
    for block in blocks:
        block.register_forward_pre_hook(keep, with_kwargs=True)
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(0, 50000, (1, 448))
        with torch.no_grad():
            model(torch.from_numpy(_sound(seed))[None], decoder_input_ids=torch.from_numpy(ids))
    for block, norm in zip(blocks, norms, strict=True):
        gain, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        w_k, w_v = (x.weight.detach().numpy().T for x in (block.k_proj, block.v_proj))
        b_v = bias @ w_v + block.v_proj.bias.detach().numpy()
        measured, sample = ((x - bias) / gain for x in seen[block])
        yield Block(gain[:, None] * w_k, gain[:, None] * w_v, b_v, measured, sample)


def _sound(seed: int) -> Array:
    """A log-mel spectrogram [80, 3000] with gliding formants and syllables, in place of speech."""
    rng = np.random.default_rng(seed)
    seconds, mel = np.arange(3000) / 100, np.arange(80)[:, None]
    sound = np.full((80, 3000), -0.6)
    for formant in range(4):
        glide = np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * seconds + rng.uniform(0, 6))
        voiced = np.sin(2 * np.pi * rng.uniform(1.5, 3) * seconds) > -0.3
        shape = np.exp(-(((mel - 10 - 15 * formant - 6 * glide) / 3) ** 2))
        sound = np.maximum(sound, 1.2 * shape * voiced - 0.6)
    return sound + 0.1 * rng.standard_normal(sound.shape)


def _attention_inputs(model: Llama, tokens: Array, padding: Array) -> list[Array]:
    inputs: list[Array] = []
    forward(model, tokens, padding, REFERENCE, inputs=inputs)
    real = (np.arange(tokens.shape[1]) >= padding[:, None]).reshape(-1)
    return [x[real] for x in inputs]


def _sample(model: Llama) -> list[Array]:
    """Inputs of attention on text that the model makes up: what can be known without any data.

    It starts as random tokens; in each round all tokens at once are drawn from what the model
    predicts for their place. That is much less work than generating, and soon as good.
    """
    rng, none = np.random.default_rng(0), np.zeros(2, int)
    tokens = rng.integers(0, len(model.embedding), (2, PROMPT))
    for _ in range(_ROUNDS):
        logits = forward(model, tokens, none, REFERENCE)
        # The largest of the logits plus Gumbel noise is a draw from their softmax.
        tokens[:, 1:] = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)[:, :-1]
    return _attention_inputs(model, tokens, none)


def _texts() -> tuple[Array, Array]:
    """A batch of source code [4, 768] and the padding [4] of each row."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for name, padding in _TEXTS.items():
        text = np.frombuffer((library / f"{name}.py").read_bytes(), np.uint8)[2000:]
        rows.append(np.concatenate([np.zeros(padding), text[: PROMPT + _STEPS - padding]]))
    return np.array(rows, dtype=np.int64), np.array(list(_TEXTS.values()))


def _print_values(title: str, blocks: Iterator[Block], console: Console) -> None:
    table = Table("layer", "condition", "type", "floor", "basis", title=title)
    for rank in _RANKS:
        table.add_column(f"r={rank}", justify="right")
    table.add_column("predicted, r=8", justify="right")
    table.add_column("least r for 8, 4, 2", justify="right")
    for i, block in enumerate(blocks):
        plain = value_spectrum(block.w_k, block.w_v, b_v=block.b_v)
        centred = value_spectrum(block.w_k, block.w_v, b_v=block.b_v, inputs=block.sample)
        for type_, (basis, spectrum) in (
            (t, b) for t in _TYPES for b in (("plain", plain), ("centred", centred))
        ):
            bases = {rank: spectrum.basis(rank) for rank in _RANKS}
            table.add_row(
                str(i),
                f"{condition(block.w_k):.1e}",
                type_,
                f"{block.floor(_TYPES[type_]):.1e}",
                basis,
                *(f"{block.error(b, _TYPES[type_]):.1e}" for b in bases.values()),
                f"{bases[8].predicted_error(_TYPES[type_]):.1e}",
                " ".join(str(spectrum.least_rank(t)) for t in (8, 4, 2)),
            )
    console.print(table)


def _choices() -> Iterator[tuple[str, Callable[[ValueSpectrum], int]]]:
    """How to choose the rank of a layer, and what tables call it."""
    for rank in _RANKS:
        yield f"r={rank}", lambda _, rank=rank: rank
    for tolerance in _TOLERANCES:
        yield f"within {tolerance}", lambda s, t=tolerance: s.least_rank(t, _MULTIPLE) or 0


def _print_logits(model: Llama, tokens: Array, padding: Array, console: Console) -> None:
    table = Table("arithmetic", "original's error", "basis", title="logits of the demo model")
    choices = dict(_choices())
    for name in ("K and V", *choices):
        table.add_column(name, justify="right")
    for arithmetic in _ARITHMETICS:
        stored = model.rounded(arithmetic)
        folded = stored.folded().rounded(arithmetic)
        reference = forward(stored, tokens, padding, REFERENCE)
        original = _errors(forward(stored, tokens, padding, arithmetic), reference, padding)
        control = forward(folded, tokens, padding, arithmetic)
        for basis, sample in (("plain", [None] * len(folded.layers)), ("centred", _sample(folded))):
            spectra = [
                value_spectrum(layer["k"], layer["v"], inputs=inputs)
                for layer, inputs in zip(folded.layers, sample, strict=True)
            ]
            cells = [_multiples(_errors(control, reference, padding) / original)]
            for choose in choices.values():
                bases = [spectrum.basis(choose(spectrum)) for spectrum in spectra]
                logits = forward(folded, tokens, padding, arithmetic, bases)
                keys = sum(len(b.key_to_value) for b in bases)
                factor = 2 * keys / (keys + sum(b.rank for b in bases))
                multiples = _multiples(_errors(logits, reference, padding) / original)
                cells.append(f"{multiples}\n{factor:.2f}x")
            table.add_row(arithmetic.name, " ".join(f"{x:.1e}" for x in original), basis, *cells)
    console.print(table)


def _multiples(ratios: Array) -> str:
    return " ".join(f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in ratios)


def _errors(logits: Array, reference: Array, padding: Array) -> Array:
    """The relative errors [2] of the prompts and of the steps, padding left aside."""
    columns = np.arange(logits.shape[1])
    real = columns >= padding[:, None]
    parts = (real & (columns < PROMPT), real & (columns >= PROMPT))
    off = logits.astype("f8") - reference
    return np.array([np.linalg.norm(off[p]) / np.linalg.norm(reference[p]) for p in parts])


def main(
    whisper: Annotated[bool, typer.Option(help="Needs the groups exporters and trained.")] = True,
) -> None:
    """Print the error of slim attention against the rank of its residual."""
    console = Console(width=200)
    console.print(
        "basis: plain takes the inputs of attention as white; centred takes their mean and sizes "
        "from text that the model made up (Whisper: from another sound and random text).\n"
        "floor: error of values that are stored themselves. predicted: from the weights and the "
        "sample alone.\nleast r: for values at most 8, 4 and 2 times off the floor, as predicted.\n"
    )
    model, (tokens, padding) = Llama.demo(), _texts()
    _print_values("values of the demo model", demo_blocks(model.folded(), tokens, padding), console)
    if whisper:
        _print_values("values of Whisper, self attention", whisper_blocks(cross=False), console)
        _print_values("values of Whisper, cross attention", whisper_blocks(cross=True), console)
    console.print(
        "prompt and steps, as multiples of the original's error in the same type; p K: of a step; "
        "K and V: the same with an ordinary cache, where only the gains were folded; within t: the "
        f"least multiple of {_MULTIPLE} for which values are at most t times off the floor"
    )
    _print_logits(model, tokens, padding, console)


if __name__ == "__main__":
    typer.run(main)

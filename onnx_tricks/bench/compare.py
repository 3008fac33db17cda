"""Timing two models side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from onnx_tricks.bench.encoder import encode
from onnx_tricks.bench.files import Files, find_files
from onnx_tricks.bench.machine import describe_machine
from onnx_tricks.bench.memory import measure_peak
from onnx_tricks.bench.results import Comparison, Measurement, Refusal, Side
from onnx_tricks.bench.subject import Subject, open_subject
from onnx_tricks.bench.workload import Provider, Settings, Workload, plan
from onnx_tricks.errors import ModelError, TricksError, UsageError
from onnx_tricks.models import demo_path

__all__ = ["compare"]

_WARM = 2
_LEAST, _MOST = 5, 500  # pairs, where seconds are given


def compare(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    batch: Sequence[int] = (1, 8, 32),
    cached: Sequence[int] = (128, 1024, 4096),
    prompt: Sequence[int] = (512,),
    encoder: int | None = None,
    rounds: int | None = None,
    seconds: float = 2.0,
    threads: int = 0,
    provider: Provider = "cpu",
    memory: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Time two models in one process, in pairs whose order alternates.

    A time is that of ONNX Runtime's run, fully optimised, with its inputs bound and its outputs
    made anew; choosing tokens and reading logits are left out. A step reads the caches that the
    step before returned, and begins again behind 16 of them (an eighth of `cached` at most).
    Threads stop to spin between runs, so that neither model gets in the way of the other.

    Args:
        reference: A .onnx file; a folder with a decoder or with one .onnx file; or "demo".
        candidate: Likewise. An encoder is timed by naming its file.
        batch: Numbers of rows.
        cached: Decode steps are timed behind so many tokens, if both models have caches.
        prompt: Lengths of prompts, or of texts for a model without caches.
        encoder: Positions of an encoder's output; None for what the model says, else 1500.
        rounds: Number of pairs; None for as many as `seconds` allow, five at least.
        seconds: Time for each workload.
        threads: Threads of one operator; 0 lets ONNX Runtime choose.
        provider: "cpu" or "cuda".
        memory: Whether to measure peak memory, in a process for each model and workload.
        progress: Told what is timed.

    Raises:
        ModelError: A model is missing, broken or refused, or both run no workload.
        UsageError: An argument is wrong, the models take different inputs, or ONNX Runtime is
            not installed.
    """
    for name, numbers in (("batch", batch), ("cached", cached), ("prompt", prompt)):
        if any(number < 1 for number in numbers):
            raise UsageError(f"{name} takes numbers above 0, not {', '.join(map(str, numbers))}")
    for name, number in (("rounds", rounds), ("encoder", encoder)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is to be above 0, not {number}")
    told = progress or (lambda _: None)
    told("opening both models")
    pair = [find_files(_source(one)) for one in (reference, candidate)]
    _check_inputs(*pair)
    positions, states = encode(pair, encoder)
    settings = Settings(threads, provider, positions)
    subjects = [open_subject(one, settings, states) for one in pair]
    measurements, refusals = [], []
    for work in _workloads(pair, batch, cached, prompt):
        told(f"{work}, batch {work.batch}")
        runs = _prepare(subjects, work)
        if isinstance(runs, Refusal):
            refusals.append(runs)
            continue
        times = _time(runs, rounds, seconds)
        del runs  # and the caches with it
        sides = [
            Side(
                files.cache_bytes(work, positions),
                files.encoder_bytes(work, positions),
                subject.filled_by(work),
                measure_peak(files.source, work, settings) if memory else None,
            )
            for files, subject in zip(pair, subjects, strict=True)
        ]
        measurements.append(Measurement(work, times, *sides))
    if not measurements:
        reason = f"{refusals[0].model}: {refusals[0].reason}" if refusals else "no workload is left"
        raise ModelError(f"{pair[0].source} and {pair[1].source}: nothing was timed: {reason}")
    return Comparison(
        pair[0].source,
        pair[1].source,
        settings,
        describe_machine(),
        tuple(measurements),
        tuple(refusals),
    )


def _source(given: str | os.PathLike[str]) -> Path:
    path = Path(given)
    return demo_path() if os.fspath(given) == "demo" and not path.exists() else path


def _check_inputs(reference: Files, candidate: Files) -> None:
    """Refuse models that no text, image or sound goes into alike."""
    first, second = (_content(one) for one in (reference, candidate))
    if first.keys() != second.keys():
        raise ModelError(
            f"the inputs do not go together: {reference.source} takes {_listed(first)}, but "
            f"{candidate.source} takes {_listed(second)}"
        )
    for name, dims in first.items():
        known = zip(dims, second[name], strict=False)
        if len(dims) != len(second[name]) or any(
            a != b for a, b in known if isinstance(a, int) and isinstance(b, int)
        ):
            raise ModelError(
                f"the inputs do not go together: {name} is {list(dims)} in {reference.source}, "
                f"but {list(second[name])} in {candidate.source}"
            )


def _content(files: Files) -> dict[str, tuple[int | str | None, ...]]:
    """What a model is about, by name: not what follows from it, nor from runs before."""
    return {
        "tokens" if one.role == "ids" else name: one.dims
        for name, one in files.inputs.items()
        if one.role in ("ids", "other")
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing but caches"


def _workloads(
    pair: Sequence[Files], batch: Sequence[int], cached: Sequence[int], prompt: Sequence[int]
) -> Iterator[Workload]:
    """What both models can do of what is asked for; fixed sizes take the place of others."""
    ids = [one.ids.dims for one in pair if one.ids is not None]
    rows = {dims[0] for dims in ids if isinstance(dims[0], int)}
    lengths = {dims[1] for dims in ids if isinstance(dims[1], int)}
    steps = cached if all(one.decodes for one in pair) and lengths <= {1} else ()
    texts = (sorted(lengths) or prompt) if ids else (0,)
    if not all(one.prompts for one in pair) and ids:
        texts = ()
    return plan(sorted(rows) or batch, steps, texts)


def _prepare(
    subjects: Sequence[Subject], work: Workload
) -> tuple[Callable[[], float], Callable[[], float]] | Refusal:
    """Get both models ready for a workload, and warm."""
    runs = []
    for name, subject in zip(("reference", "candidate"), subjects, strict=True):
        try:
            run = subject.prepare(work)
            for _ in range(_WARM):
                run()
        except TricksError as error:
            return Refusal(work, name, str(error))
        runs.append(run)
    return runs[0], runs[1]


def _time(
    runs: tuple[Callable[[], float], Callable[[], float]], rounds: int | None, seconds: float
) -> tuple[tuple[float, float], ...]:
    """Times of pairs of runs, reference first; who runs first changes from pair to pair."""
    reference, candidate = runs
    least, most = (_LEAST, _MOST) if rounds is None else (rounds, rounds)
    end = time.perf_counter() + seconds
    pairs: list[tuple[float, float]] = []
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() < end):
        if len(pairs) % 2:
            after = candidate()
            pairs.append((reference(), after))
        else:
            pairs.append((reference(), candidate()))
    return tuple(pairs)

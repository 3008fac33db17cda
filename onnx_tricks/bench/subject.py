"""A model that is timed, opened in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from onnx_tricks.bench.encoder import encoder_inputs
from onnx_tricks.bench.files import Files
from onnx_tricks.bench.forward import Forward
from onnx_tricks.bench.generation import Generation
from onnx_tricks.bench.workload import Settings, Workload
from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.sessions import Array, SessionError, load_runtime, session_options

__all__ = ["Subject", "open_subject"]

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


class Subject(Protocol):
    """What can be timed."""

    def prepare(self, work: Workload) -> Callable[[], float]:
        """Get ready for a workload; a call of the result runs it and returns seconds."""

    def filled_by(self, work: Workload, /) -> str:
        """What fills the caches for a workload: "prompt", "random", or "" where there are none."""


def open_subject(
    files: Files, settings: Settings, states: Array | None = None, *, by_chance: bool = False
) -> Subject:
    """Open a model in ONNX Runtime, fully optimised.

    Args:
        files: The model.
        settings: How.
        states: The output of an encoder, [1, S, D]; random numbers when None.
        by_chance: Whether to fill caches with random numbers and never by a prompt.

    Raises:
        ModelError: ONNX Runtime refuses it.
        UsageError: ONNX Runtime is not installed, or lacks the provider.
    """
    providers = _PROVIDERS[settings.provider]
    if providers[0] not in load_runtime().get_available_providers():
        raise UsageError(
            f"this ONNX Runtime has no {providers[0]}: install onnxruntime-gpu in the place of "
            "onnxruntime, or choose the provider cpu"
        )
    options = session_options(threads=settings.threads)
    # Threads of one session must not go on spinning while the other session is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    given = encoder_inputs(files, settings, states)
    try:
        if not files.decodes:
            return Forward(files, options, providers, given)
        target = files.paths[0] if len(files.paths) == 1 else files.source
        decoder = Decoder(target, providers=providers, options=options)
    except SessionError as error:
        raise ModelError(f"{files.paths[0]}: ONNX Runtime refuses the model: {error}") from error
    return Generation(files, settings, decoder, given, by_chance=by_chance)

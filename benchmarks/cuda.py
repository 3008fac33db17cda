"""The operators' CUDA kernels on the GPU at hand: whether they are right, and how fast they are.

    python benchmarks/cuda.py                  # at most ten minutes, everything
    python benchmarks/cuda.py --dry-run        # on a CPU, only whether this script works

Needs torch, onnx, numpy, a CUDA build of ONNX Runtime, and CMake with nvcc unless `--library` names
a library. Every task runs in a process that reports what it found line by line; when one fails so
badly that it takes the device's context with it, the rest goes on in another process. What was
printed is written to `results/` as well, with the date and the name of the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch  # before ONNX Runtime: it loads the libraries that the CUDA provider needs
from onnx import TensorProto, helper

import onnxruntime  # isort: skip

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from tests.operators.reference import slim_attention, slim_hidden  # noqa: E402

_TYPES = {
    "fp32": (TensorProto.FLOAT, torch.float32, 5e-6),
    "fp16": (TensorProto.FLOAT16, torch.float16, 1e-3),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16, 8e-3),
}
"""Types, and the error that is allowed them: for 16 bits twice that of rounding the output."""

_PROMPT = 16
"""New tokens from which on the rule is another: keys, values and weights may be rounded."""

_PAIRS = ("fp32/fp32", "fp32/fp16", "fp32/bf16", "fp16/fp16", "bf16/bf16")
_PATHS = ("plain", "tensor", "cluster")
_RANK = 32
_MOST_SECONDS = 60.0  # of a task; a kernel may hang
_WIDTHS = (7, 3, 3, 12, 9, 6, 9, 9, 7)


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to find out.

    Attributes:
        kind: `copy`, `check` or `speed`.
        op: The operator.
        path: What computes the sums of the latent: see onnx_tricks/csrc/cuda/plan.h.
        types: Of the model and of its cache.
        sizes: Batch, heads, groups, new tokens, cached tokens, width of a head, width of the latent
            beside the keys.
        form: Attributes of the node.
        in_place: Whether past and present are one buffer.
    """

    kind: str
    op: str = "SlimAttention"
    path: str = "cluster"
    types: str = "fp16/fp16"
    sizes: tuple[int, ...] = ()
    form: tuple[str, ...] = ()
    in_place: bool = False

    def __str__(self) -> str:
        """For tables and messages."""
        names = ("B", "H", "G", "T", "P", "K", "D" if "Slim" in self.op and self.hidden else "r")
        sizes = " ".join(f"{n}{size}" for n, size in zip(names, self.sizes, strict=False))
        form = " ".join((*self.form, *["in-place"] * self.in_place))
        return f"{self.kind} {self.op} {self.path} {self.types} {sizes} {form}".rstrip()

    @property
    def hidden(self) -> bool:
        """Whether states are cached instead of keys."""
        return self.op in ("SlimHiddenAttention", "SlimCrossAttention")


def _checks(small: bool) -> Iterator[Task]:
    """Every mode, type and path; then shapes that models have."""
    for path in _PATHS:
        for types in _PAIRS:
            for new, past in ((1, 100), (3, 0), (70, 30)):
                for in_place in (False, True):
                    sizes = (2, 8, 4, new, past, 32, 8)
                    yield Task("check", "SlimAttention", path, types, sizes, (), in_place)
                sizes = (2, 8, 4, new, past, 16, 96)
                yield Task("check", "SlimHiddenAttention", path, types, sizes, ("softcap",), True)
                yield Task("check", "SlimCrossAttention", path, types, sizes)
        for form in (("interleaved",), ("safe",), ("softcap", "interleaved", "safe")):
            yield Task("check", "SlimAttention", path, "fp32/fp16", (1, 6, 6, 2, 77, 32, 0), form)
        yield Task("check", "SlimAttention", path, "fp32/fp16", (3, 6, 2, 1, 77, 6, 3))
    if small:
        return
    for path in _PATHS:
        for heads in (8, 16, 24, 32, 40):
            yield Task("check", path=path, sizes=(2, heads, heads, 1, 1500, 128, _RANK))
        yield Task("check", path=path, sizes=(1, 32, 32, 4, 5000, 128, _RANK), in_place=True)
        yield Task("check", path=path, sizes=(1, 32, 32, 200, 300, 128, _RANK))
        for width in (384, 1280, 4096):
            sizes = (2, width // 64, width // 64, 1, 1500, 64, width)
            yield Task("check", "SlimCrossAttention", path, "fp16/fp16", sizes)
            yield Task("check", "SlimHiddenAttention", path, "fp32/fp16", sizes, (), True)


def _speeds(small: bool) -> Iterator[Task]:
    if small:
        lengths, heads, batches = (64,), (2,), (1, 2)
    else:
        lengths, heads, batches = (32768, 131072, 4096), (32, 16), (1, 8, 32)
    for length in lengths:
        for count in heads:
            for batch in batches:
                sizes = (batch, count, count, 1, length - 1, 128, _RANK)
                for path in ("cluster", "tensor"):
                    yield Task("speed", path=path, sizes=sizes, in_place=True)
                for op in ("GroupQueryAttention", "MultiHeadAttention"):
                    yield Task("speed", op, "", sizes=sizes, in_place=True)
    plain = Task(
        "speed", path="plain", sizes=(1, heads[0], heads[0], 1, lengths[0] - 1, 128, _RANK)
    )
    yield plain
    for path in ("cluster", "tensor"):
        yield dataclasses.replace(plain, path=path)  # past and present apart
        for width in (1024, 4096):
            sizes = (8, width // 64, width // 64, 1, lengths[0] - 1, 64, width)
            yield Task("speed", "SlimHiddenAttention", path, sizes=sizes, in_place=True)
    for new, past in ((lengths[-1], 0), (lengths[-1], lengths[0] - lengths[-1])):
        sizes = (1, heads[0], heads[0], new, past, 128, _RANK)
        for op, path in (("SlimAttention", "cluster"), ("GroupQueryAttention", "")):
            yield Task("speed", op, path, sizes=sizes, in_place=True)


def _tasks(small: bool) -> list[Task]:
    return [Task("copy"), *_checks(small), *_speeds(small)]


class Machine:
    """Where tensors lie and how time is taken."""

    def __init__(self, dry: bool, library: Path) -> None:
        self.name = "cpu" if dry else "cuda"
        self.library = library
        if not dry:
            self.stream = torch.cuda.Stream()
            torch.cuda.set_stream(self.stream)

    def session(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """A session that runs nothing anywhere else."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(self.library))
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.name == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            given = {
                "user_compute_stream": str(self.stream.cuda_stream),
                "arena_extend_strategy": "kSameAsRequested",
            }
            providers = [("CUDAExecutionProvider", given)]
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=providers
        )
        if self.name == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("ONNX Runtime did not take the CUDA provider")
        return session

    def free_bytes(self) -> int:
        """Memory that tensors may take."""
        return int(torch.cuda.mem_get_info()[0]) if self.name == "cuda" else 1 << 30

    def works(self) -> bool:
        """Whether the device still does anything, which it does not behind a kernel's fault."""
        try:
            return self.name == "cpu" or float(torch.ones(1, device=self.name).sum()) == 1
        except RuntimeError:
            return False

    def seconds(self, run: Callable[[], None], count: int) -> float:
        """How long one of several calls takes: on the device, as its stream counts."""
        if self.name == "cpu":
            start = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - start) / count
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(self.stream)
        for _ in range(count):
            run()
        events[1].record(self.stream)
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / count

    def median(self, run: Callable[[], None], rounds: int = 7) -> float:
        """The median of rounds of some fifty milliseconds each, after one for warmth."""
        self.seconds(run, 3)
        count = max(1, min(50, int(0.05 / max(self.seconds(run, 3), 1e-6))))
        return statistics.median(self.seconds(run, count) for _ in range(rounds))

    def kernels(self, run: Callable[[], None]) -> dict[str, float]:
        """Microseconds of each kernel in one call, by the profiler: without gaps between them."""
        if self.name == "cpu":
            return {}
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        found = {event.key: event.self_device_time_total for event in profile.key_averages()}
        return {name[:60]: round(time, 1) for name, time in found.items() if time}


def _bind(
    session: onnxruntime.InferenceSession, tensors: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """Binds inputs and outputs to tensors, wherever those lie; the same one may be both."""
    binding = session.io_binding()
    kinds = {torch_type: onnx_type for onnx_type, torch_type, _ in _TYPES.values()}
    kinds[torch.int32] = TensorProto.INT32
    for names, bind in (
        ([i.name for i in session.get_inputs()], binding.bind_input),
        ([o.name for o in session.get_outputs()], binding.bind_output),
    ):
        for name in names:
            tensor = tensors[name]
            place = (tensor.device.type, 0, kinds[tensor.dtype], list(tensor.shape))
            bind(name, *place, tensor.data_ptr())
    options = onnxruntime.RunOptions()
    # Calls are queued on the device's stream, as tokens of a model's layers are.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return lambda: session.run_with_iobinding(binding, options)


def _model(
    nodes: list[Any], tensors: dict[str, torch.Tensor], outputs: list[str]
) -> onnx.ModelProto:
    """A model of nodes whose inputs and outputs are all the graph's."""
    kinds = {torch_type: onnx_type for onnx_type, torch_type, _ in _TYPES.values()}
    kinds[torch.int32] = TensorProto.INT32
    infos = {
        name: helper.make_tensor_value_info(name, kinds[tensor.dtype], list(tensor.shape))
        for name, tensor in tensors.items()
    }
    inputs = [info for name, info in infos.items() if name not in outputs]
    graph = helper.make_graph(nodes, "one", inputs, [infos[name] for name in outputs])
    opsets = [helper.make_opsetid(*o) for o in (("", 18), ("com.microsoft", 1), ("onnx_tricks", 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


_INPUTS = {
    "SlimAttention": "query key past_key value_weight cos sin bias residual past_residual key_bias "
    "value_bias",
    "SlimHiddenAttention": "query hidden past_hidden key_weight value_weight bias value_bias",
    "SlimCrossAttention": "query hidden key_weight value_weight bias value_bias",
}
_STATES = {"past_key": "key", "past_residual": "residual", "past_hidden": "hidden"}


def _shapes(task: Task) -> dict[str, tuple[int, ...]]:
    batch, heads, groups, new, past, head, width = task.sizes
    total = past + new
    shapes = {"query": (batch, heads, new, head), "bias": (batch, 1, new, total)}
    if task.hidden:
        own = total if task.op == "SlimCrossAttention" else new
        shapes |= {
            "hidden": (batch, own, width),
            "past_hidden": (batch, past, width),
            "key_weight": (groups, head, width),
            "value_weight": (groups, width, head),
            "value_bias": (heads, 1, head),
        }
    else:
        rotary = head // 2 // 8 * 8 or head // 2
        shapes |= {
            "key": (batch, groups, new, head),
            "past_key": (batch, groups, past, head),
            "value_weight": (groups, groups * head + width, head),
            "cos": (1, total, rotary),
            "sin": (1, total, rotary),
            "residual": (batch, new, width),
            "past_residual": (batch, past, width),
            "key_bias": (groups, 1, head),
            "value_bias": (heads, 1, head),
        }
    if not width:
        shapes = {name: shape for name, shape in shapes.items() if "residual" not in name}
    return {name: shapes[name] for name in _INPUTS[task.op].split() if name in shapes}


def _feeds(task: Task, device: str) -> dict[str, torch.Tensor]:
    """Random numbers for all inputs of a node, in their types."""
    generator = torch.Generator(device).manual_seed(hash(task.sizes) % 2**31)
    plain, cached = (_TYPES[name][1] for name in task.types.split("/"))
    feeds = {}
    for name, shape in _shapes(task).items():
        kind = (
            cached
            if name in _STATES or (task.op, name) == ("SlimCrossAttention", "hidden")
            else plain
        )
        tensor = torch.empty(shape, dtype=kind, device=device).normal_(generator=generator)
        if "weight" in name:
            tensor /= shape[-2 if name == "value_weight" else -1] ** 0.5
        if name in ("cos", "sin"):
            angle = torch.arange(tensor.numel(), device=device).reshape(shape) * 0.37
            tensor = getattr(torch, name)(angle).to(kind)
        if name == "bias" and shape[2] > 1:
            future = torch.ones(shape[2:], dtype=torch.bool, device=device).triu(task.sizes[4] + 1)
            tensor.masked_fill_(future, -torch.inf)
        feeds[name] = tensor
    if "safe" in task.form:
        feeds["bias"][..., -1, :] = -torch.inf
    return feeds


def _outputs(task: Task, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the outputs go, full of NaN; where the past is a buffer, into it."""
    batch, heads, _, new, past, head, _ = task.sizes
    outputs = {"output": feeds["query"].new_full((batch, new, heads * head), torch.nan)}
    for name, fresh in _STATES.items():
        if name not in feeds:
            continue
        old = feeds[name]
        capacity = past + new + (5 if task.in_place and task.kind == "check" else 0)
        buffer = old.new_full((*old.shape[:-2], capacity, old.shape[-1]), torch.nan)
        if task.in_place:
            buffer[..., :past, :] = old
            feeds[name] = buffer
        outputs[f"present_{fresh}"] = buffer
    return outputs


def _node(task: Task, index: str = "") -> Any:
    """A node; several in one model are told apart by an index behind each name."""
    shapes = _shapes(task)
    present = [f"present_{fresh}" for name, fresh in _STATES.items() if name in shapes]
    inputs = [name + index if name in shapes else "" for name in _INPUTS[task.op].split()]
    attributes: dict[str, Any] = {name: 1 for name in task.form if name != "softcap"}
    if "softcap" in task.form:
        attributes["softcap"] = 5.0
    return helper.make_node(
        task.op,
        inputs,
        [name + index for name in ("output", *present)],
        domain="onnx_tricks",
        scale=task.sizes[5] ** -0.5,
        **attributes,
    )


def _expected(task: Task, feeds: dict[str, torch.Tensor], **options: Any) -> np.ndarray[Any, Any]:
    """The output in float64, from inputs as they are and new rows rounded to the cache's type."""
    past, cached = task.sizes[4], _TYPES[task.types.split("/")[1]][1]
    arrays = {}
    for name, tensor in feeds.items():
        kept = tensor[..., :past, :] if name in _STATES else tensor
        kept = kept.to(cached) if name in _STATES.values() else kept
        arrays[name] = kept.double().cpu().numpy()
    options |= {"scale": task.sizes[5] ** -0.5, "softcap": 5.0 * ("softcap" in task.form)}
    if task.hidden:
        return slim_hidden(arrays, **options)[0]
    return slim_attention(arrays, interleaved="interleaved" in task.form, **options)[0]


def _check(task: Task, machine: Machine) -> dict[str, Any]:
    """The error of the output against float64, and against the CPU kernel's."""
    feeds = _feeds(task, machine.name)
    # The reference gives nothing to attend to zeros, but adds the bias to it, as no operator does.
    if "safe" in task.form:
        feeds["value_bias"].zero_()
    outputs = _outputs(task, feeds)
    # NumPy takes minutes where the CPU's kernel takes seconds; that one is tested against NumPy.
    large = np.prod(task.sizes[:3]) * task.sizes[4] * task.sizes[5] > 1 << 26
    wanted = None if large else _expected(task, feeds)
    beside = {name: tensor.cpu().clone() for name, tensor in (feeds | outputs).items()}
    for name, fresh in _STATES.items():
        if task.in_place and name in feeds:
            beside[f"present_{fresh}"] = beside[name]
    model = _model([_node(task)], feeds | outputs, list(outputs))
    _bind(machine.session(model), feeds | outputs)()
    if machine.name == "cuda":
        torch.cuda.synchronize()
    _bind(Machine(True, machine.library).session(model), beside)()
    ours, theirs = (t["output"].double().cpu().numpy() for t in (outputs, beside))
    reference = theirs if wanted is None else wanted.reshape(ours.shape)
    error, apart = (_error(ours, other) for other in (reference, theirs))
    # Rows in use are the same to the last bit, and those behind them are as they were.
    same = all(
        torch.equal(torch.nan_to_num(outputs[name].cpu()), torch.nan_to_num(beside[name]))
        for name in outputs
        if name != "output"
    )
    limit = _limit(task, feeds, reference)
    right = error <= limit and apart <= 2 * limit and same
    return {"right": right, "error": error, "from_cpu": apart, "states": same}


def _limit(task: Task, feeds: dict[str, torch.Tensor], exact: np.ndarray[Any, Any]) -> float:
    """The error allowed to the output: for prompts twice that of attention in the model's type."""
    plain = task.types.split("/")[0]
    _, kind, limit = _TYPES[plain]

    def rounded(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return torch.from_numpy(array).to(kind).double().numpy()

    if plain == "fp32" or task.sizes[3] < _PROMPT:
        return limit
    usual = rounded(_expected(task, feeds, rounded=rounded)).reshape(exact.shape)
    return max(limit, 2 * _error(usual, exact))


def _error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    if np.isnan(ours).any() or np.isinf(ours).any():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-30))


def _copy(machine: Machine) -> dict[str, Any]:
    """Bytes read and written in a second by a copy of what is many times any cache."""
    count = 1 << (32 if machine.name == "cuda" else 26)
    source = torch.empty(count, dtype=torch.uint8, device=machine.name).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return {"rate": 2 * count / machine.median(copy)}


def _cache_bytes(task: Task) -> int:
    """What a step reads of its cache."""
    batch, _, groups, new, past, head, width = task.sizes
    if "Slim" in task.op:
        row = width if task.hidden else groups * head + width
    else:
        row = 2 * groups * head
    return batch * (past + new) * row * 2


def _speed(task: Task, machine: Machine) -> dict[str, Any]:
    """The time of one node, of several in one model whose caches are larger than the L2."""
    large, small = (1 << bits for bits in ((29, 31) if machine.name == "cuda" else (20, 20)))
    bytes_each = _cache_bytes(task)
    count = max(4 if bytes_each < small else 1, min(8, large // bytes_each))
    needed = 2 * count * bytes_each + (4 << 30)
    if machine.name == "cuda" and needed > machine.free_bytes():
        return {
            "skipped": f"needs {needed / 1e9:.0f} GB, {machine.free_bytes() / 1e9:.0f} are free"
        }
    make = _slim_speed if "Slim" in task.op else _plain_speed
    nodes, tensors, outputs = [], {}, []
    for i in range(count):
        node, own = make(task, machine, f"_{i}")
        nodes.append(node)
        tensors |= own
        outputs += [name for name in node.output if name]
    run = _bind(machine.session(_model(nodes, tensors, outputs)), tensors)
    result = {"seconds": machine.median(run) / count, "bytes": bytes_each, "nodes": count}
    with contextlib.suppress(RuntimeError, AttributeError):  # where there is no profiler
        result["kernels"] = {name: time / count for name, time in machine.kernels(run).items()}
    return result


def _slim_speed(task: Task, machine: Machine, index: str) -> tuple[Any, dict[str, torch.Tensor]]:
    feeds = _feeds(task, machine.name)
    if task.sizes[3] == 1:
        feeds["bias"].zero_()
    outputs = _outputs(task, feeds)
    tensors = {name + index: tensor for name, tensor in (feeds | outputs).items()}
    return _node(task, index), tensors


def _plain_speed(task: Task, machine: Machine, index: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """ONNX Runtime's own operators, with a cache of keys and one of values.

    GroupQueryAttention appends to both in place and rotates, as a model's node would;
    MultiHeadAttention, which would copy a past, is spared that: it reads keys and values as given.
    """
    batch, heads, groups, new, past, head, _ = task.sizes
    total, kind = past + new, _TYPES[task.types.split("/")[0]][1]

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device=machine.name).normal_()

    own = {"query": random(batch, new, heads * head)}
    caches = [random(batch, groups, total, head) for _ in range(2)]
    own["output"] = torch.empty_like(own["query"])
    if task.op == "MultiHeadAttention":
        own |= {"key": caches[0], "value": caches[1]}
        node = helper.make_node(
            task.op,
            [name + index for name in ("query", "key", "value")],
            ["output" + index],
            domain="com.microsoft",
            num_heads=heads,
        )
    else:
        angle = torch.arange(total * head // 2).reshape(total, head // 2) * 0.37
        own |= {
            "key": random(batch, new, groups * head),
            "value": random(batch, new, groups * head),
            "past_key": caches[0],
            "past_value": caches[1],
            "lengths": torch.full((batch,), total - 1, dtype=torch.int32, device=machine.name),
            "total": torch.tensor(total, dtype=torch.int32),
            "cos": torch.cos(angle).to(machine.name, kind),
            "sin": torch.sin(angle).to(machine.name, kind),
            "present_key": caches[0],
            "present_value": caches[1],
        }
        names = "query key value past_key past_value lengths total cos sin"
        node = helper.make_node(
            task.op,
            [name + index for name in names.split()],
            [name + index for name in ("output", "present_key", "present_value")],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=groups,
            do_rotary=1,
        )
    return node, {name + index: tensor for name, tensor in own.items()}


def _work(tasks: list[Task], indices: list[int], machine: Machine) -> None:
    """In a process of its own: one line of JSON for each task, while the device works."""
    for index in indices:
        task = tasks[index]
        _choose_path(task.path)
        run = {"check": _check, "speed": _speed, "copy": lambda _, m: _copy(m)}[task.kind]
        result: dict[str, Any]
        try:
            result = run(task, machine)
        except Exception as error:  # noqa: BLE001
            result = {"failed": str(error).strip().splitlines()[-1][:300]}
        print(json.dumps({"index": index} | result), flush=True)
        if "failed" in result and not machine.works():
            sys.exit(1)
        if machine.name == "cuda":
            torch.cuda.empty_cache()


def _choose_path(path: str) -> None:
    """Holds back the kernels that are faster than a path: the library looks at every call."""
    os.environ.pop("ONNX_TRICKS_CUDA", None)
    if path in ("plain", "tensor"):
        os.environ["ONNX_TRICKS_CUDA"] = path


def _results(count: int, arguments: argparse.Namespace, library: Path) -> Iterator[dict[str, Any]]:
    """Runs all tasks in processes, each going on behind the task that ended the one before."""
    deadline = time.monotonic() + arguments.budget
    left = list(range(count))
    while left and time.monotonic() < deadline:
        command = [sys.executable, __file__, "--library", str(library), "--work", *map(str, left)]
        command += ["--dry-run"] * arguments.dry_run
        failed = False
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            for line in _lines(process, deadline):
                result = json.loads(line)
                left.remove(result["index"])
                failed = "failed" in result
                yield result
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
        if left and not failed and time.monotonic() < deadline:
            reason = f"exit status {process.returncode} {said[-1][:300] if said else ''}"
            yield {"index": left.pop(0), "failed": reason}
    yield from ({"index": index, "skipped": "no time left"} for index in left)


def _lines(process: subprocess.Popen[str], deadline: float) -> Iterator[str]:
    """What a process prints of JSON until it ends, hangs in a task or runs out of time."""
    assert process.stdout is not None
    try:
        while True:
            patience = min(_MOST_SECONDS, max(0.0, deadline - time.monotonic()))
            watch = threading.Timer(patience, process.kill)
            watch.start()
            line = process.stdout.readline()
            watch.cancel()
            if not line:
                return
            if line.startswith("{"):
                yield line
    finally:
        process.kill()
        process.wait()


def _build(folder: Path) -> Path:
    """The library, for the GPU at hand alone."""
    major, minor = torch.cuda.get_device_capability()
    chip = f"{major}{minor}{'a' if major == 9 else ''}-real"
    source = _ROOT / "onnx_tricks" / "csrc"
    subprocess.run(
        ["cmake", "-S", source, "-B", folder, f"-DCMAKE_CUDA_ARCHITECTURES={chip}"], check=True
    )
    subprocess.run(["cmake", "--build", folder, "--target", "onnx_tricks", "-j4"], check=True)
    return next(folder.glob("*onnx_tricks*.so"))


class Report:
    """What is printed, and written to a file in the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.start = time.monotonic()

    def say(self, line: str, keep: bool = True) -> None:
        """Prints a line; those to keep go into the file."""
        print(line if keep else f"[{time.monotonic() - self.start:4.0f} s] {line}", flush=True)
        if keep:
            self.lines.append(line)


def _tell(task: Task, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED  {task}: {result['failed']}"
    if "skipped" in result:
        return f"skipped {task}: {result['skipped']}"
    if task.kind == "check":
        state = "right " if result["right"] else "WRONG "
        return (
            f"{state}  {task}: error {result['error']:.1e}, {result['from_cpu']:.1e} from the CPU's"
            f"{'' if result['states'] else ', present states differ'}"
        )
    if task.kind == "copy":
        return f"copy    {result['rate'] / 1e9:.0f} GB/s, read and written"
    kernels = sorted(result.get("kernels", {}).items(), key=lambda item: -item[1])
    inside = f" ({sum(time for _, time in kernels):.1f} in kernels)" if kernels else ""
    rest = "".join(f"\n          {time:9.1f} {name}" for name, time in kernels[:6])
    return f"speed   {task}: {result['seconds'] * 1e6:.1f} us{inside}{rest}"


def _tables(found: list[tuple[Task, dict[str, Any]]]) -> Iterator[str]:
    rate = next((r["rate"] for t, r in found if t.kind == "copy" and "rate" in r), float("nan"))
    checks = [(t, r) for t, r in found if t.kind == "check"]
    yield f"device copy: {rate / 1e9:.0f} GB/s, read and written"
    for path in _PATHS:
        own = [r for t, r in checks if t.path == path]
        right = sum(r.get("right", False) for r in own)
        yield f"checks, {path}: {right} of {len(own)} right"
    yield ""
    yield "Of a node: time; bytes of cache read in it, as a share of the copy's rate; times of"
    yield "GroupQueryAttention and MultiHeadAttention; how much faster than the better of them."
    yield "Steps of one token, by what reads the cache; prompts of T tokens."
    heads = ("S", "H", "B", "path", "us", "share", "GQA us", "MHA us", "faster")
    yield " ".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True))
    for task, result in found:
        if task.kind != "speed" or not task.path or "seconds" not in result:
            continue
        batch, heads, _, new, past, *_ = task.sizes
        base = {
            t.op: r["seconds"]
            for t, r in found
            if not t.path and t.kind == "speed" and t.sizes == task.sizes and "seconds" in r
        }
        times = [base.get(op) for op in ("GroupQueryAttention", "MultiHeadAttention")]
        share = f"{result['bytes'] / result['seconds'] / rate:.0%}" if new == 1 else "-"
        faster = min(base.values()) / result["seconds"] if base else None
        name = task.path + ("" if task.in_place else "+copy") + (" D" if task.hidden else "")
        name = name if new == 1 else f"T {new}"
        yield (
            f"{past + new:>7} {heads:>3} {batch:>3} {name:>12} {result['seconds'] * 1e6:>9.1f} "
            f"{share:>6} "
            + " ".join(f"{t * 1e6:>9.1f}" if t else f"{'-':>9}" for t in times)
            + (f" {faster:>6.2f}x" if faster else f" {'-':>7}")
        )


def _heading(dry: bool) -> str:
    name = platform.processor() or platform.machine() if dry else torch.cuda.get_device_name()
    versions = f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}"
    cuda = "" if dry else f", CUDA {torch.version.cuda}"
    return f"{'DRY RUN on ' if dry else ''}{name}; {versions}{cuda}; {dt.date.today().isoformat()}"


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--library", type=Path, help="instead of building one")
    parser.add_argument("--budget", type=float, default=500, help="seconds for all tasks")
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tasks = _tasks(arguments.dry_run)
    if arguments.work is not None:
        _work(tasks, arguments.work, Machine(arguments.dry_run, arguments.library))
        return

    report = Report()
    report.say(_heading(arguments.dry_run))
    with tempfile.TemporaryDirectory() as folder:
        library = arguments.library or _build(Path(folder))
        report.say(f"{len(tasks)} tasks with {library}", keep=False)
        found = []
        for result in _results(len(tasks), arguments, library.resolve()):
            task = tasks[result["index"]]
            found.append((task, result))
            report.say(_tell(task, result), keep=False)
    report.say("")
    for task, result in found:
        if "failed" in result or "skipped" in result or not result.get("right", True):
            report.say(_tell(task, result))
    for line in _tables(found):
        report.say(line)
    if not arguments.dry_run:
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        file = arguments.results / f"{dt.date.today().isoformat()}-cuda-{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        everything = [*report.lines, "", *(_tell(task, result) for task, result in found)]
        file.write_text("\n".join(everything) + "\n")
        print(f"written to {file}")


if __name__ == "__main__":
    main()

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnx_tricks.errors import PassError, UsageError
from onnx_tricks.graph import disk, save
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model

SameModel = Callable[[Path, Path], None]


def _round_trip(source: Path, target: Path) -> Path:
    loaded = load_model(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(loaded.model, target, loaded.layout.renamed(source.name, target.name))
    return target


def _lazy_model(tensors: list[ir.TensorProtocol]) -> ir.Model:
    """A model whose initializers `w0`, `w1`, ... are summed up."""
    values = [
        ir.Value(name=f"w{i}", shape=t.shape, type=ir.TensorType(t.dtype), const_value=t)
        for i, t in enumerate(tensors)
    ]
    node = ir.node("Sum", values)
    node.outputs[0].name = "y"
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18})
    graph.name = "g"
    return ir.Model(graph, ir_version=10)


def test_a_rich_model_survives_within_one_file(
    tmp_path: Path, rich_model: onnx.ModelProto, assert_same_model: SameModel
) -> None:
    onnx.save(rich_model, tmp_path / "in.onnx")
    # Nodes that the input lists out of order are written in order.
    assert_same_model(tmp_path / "in.onnx", _round_trip(tmp_path / "in.onnx", tmp_path / "o.onnx"))
    assert [path.name for path in tmp_path.iterdir()].count("o.onnx") == 1
    onnx.checker.check_model(tmp_path / "o.onnx")


def test_a_rich_model_survives_with_external_data(
    tmp_path: Path, save_external: Callable[..., Path], assert_same_model: SameModel
) -> None:
    source = save_external(tmp_path / "in" / "model.onnx")
    target = _round_trip(source, tmp_path / "out" / "small.onnx")
    assert_same_model(source, target)
    assert sorted(p.name for p in target.parent.iterdir()) == ["small.onnx", "small.onnx_data"]
    onnx.checker.check_model(target)


def test_the_demo_model_survives(tmp_path: Path, assert_same_model: SameModel) -> None:
    with resources.as_file(resources.files("onnx_tricks.models") / "demo" / "model.onnx") as demo:
        target = _round_trip(demo, tmp_path / "model.onnx")
        assert_same_model(demo, target)
        assert abs(target.stat().st_size - demo.stat().st_size) < 100


@pytest.mark.parametrize("external", [False, True])
def test_two_runs_write_the_same_bytes_and_a_second_pass_changes_nothing(
    tmp_path: Path,
    rich_model: onnx.ModelProto,
    save_external: Callable[..., Path],
    external: bool,
) -> None:
    source = tmp_path / "in" / "m.onnx"
    save_external(source) if external else (source.parent.mkdir(), onnx.save(rich_model, source))
    folders = [tmp_path / name for name in ("first", "second", "again")]
    for folder, origin in zip(folders, [source, source, folders[0] / "m.onnx"], strict=True):
        _round_trip(origin, folder / "m.onnx")
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 1 + external


def test_data_files_hold_the_weights_and_nothing_else(
    tmp_path: Path, save_external: Callable[..., Path]
) -> None:
    target = _round_trip(save_external(tmp_path / "in" / "m.onnx"), tmp_path / "out" / "m.onnx")
    model = onnx.load(target, load_external_data=False)
    tensors = [*model.graph.initializer]
    for node in model.graph.node:
        tensors += [t for a in node.attribute for t in a.g.initializer]
    places = [{e.key: e.value for e in tensor.external_data} for tensor in tensors]
    spans = sorted((int(p["offset"]), int(p["length"])) for p in places if p)
    assert len(spans) > 5
    end = 0
    for offset, length in spans:
        assert offset == end
        end += length
    assert (tmp_path / "out" / "m.onnx_data").stat().st_size == end


def test_initializers_that_share_bytes_keep_sharing_them(tmp_path: Path) -> None:
    np.arange(1024, dtype=np.float32).tofile(tmp_path / "in.data")
    tensors = []
    for name, offset in (("a", 0), ("b", 0), ("c", 2048)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[512])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "in.data"), ("offset", offset), ("length", 2048)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    node = helper.make_node("Sum", ["a", "b", "c"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])
    graph = helper.make_graph([node], "g", [], [output], tensors)
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "in.onnx")
    target = _round_trip(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert (tmp_path / "out.data").stat().st_size == 4096
    weights = {t.name: t.raw_data for t in onnx.load(target).graph.initializer}
    expected = np.arange(1024, dtype=np.float32).tobytes()
    assert weights == {"a": expected[:2048], "b": expected[:2048], "c": expected[2048:]}


def test_one_tensor_under_two_names_is_written_under_both(tmp_path: Path) -> None:
    tensor = ir.tensor(np.arange(512, dtype=np.float32))
    model = _lazy_model([tensor, tensor])
    save_model(model, tmp_path / "m.onnx")
    save_model(model, tmp_path / "e.onnx", DataLayout(("e.data",)))
    for name in ("m.onnx", "e.onnx"):
        weights = onnx.load(tmp_path / name).graph.initializer
        assert [weight.name for weight in weights] == ["w0", "w1"]
        assert all(weight.raw_data == tensor.tobytes() for weight in weights)
    assert (tmp_path / "e.data").stat().st_size == 2048


@pytest.mark.parametrize("layout", [DataLayout(), DataLayout(("m.data",))])
def test_a_lazy_weight_is_evaluated_once_and_the_model_left_as_it_was(
    tmp_path: Path, layout: DataLayout
) -> None:
    calls = []

    def evaluate(index: int) -> ir.Tensor:
        calls.append(index)
        return ir.Tensor(np.full((16, 32), index, np.float32))

    lazy = [
        ir.LazyTensor(lambda i=i: evaluate(i), ir.DataType.FLOAT, ir.Shape([16, 32]))
        for i in range(3)
    ]
    model = _lazy_model([*lazy])
    save_model(model, tmp_path / "m.onnx", layout)
    assert calls == [0, 1, 2]
    assert [v.const_value for v in model.graph.initializers.values()] == lazy
    weights = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert [np.frombuffer(w.raw_data, np.float32)[0] for w in weights] == [0, 1, 2]


def test_a_lazy_weight_of_another_size_than_announced_is_a_defect_of_the_pass(
    tmp_path: Path,
) -> None:
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(np.zeros(400, np.float32)),
        ir.DataType.FLOAT,
        ir.Shape([512]),
        name="w0",
    )
    with pytest.raises(PassError, match="'w0' was announced with 2048 bytes and has 1600"):
        save_model(_lazy_model([lazy]), tmp_path / "m.onnx")


def test_weights_beyond_the_limit_of_protobuf_become_external(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _lazy_model([ir.tensor(np.full(512, i, np.float32)) for i in range(4)])
    save_model(model, tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    for limit, names in ((size, ["m.onnx"]), (size - 1, ["m.onnx", "m.onnx.data"])):
        (tmp_path / str(limit)).mkdir()
        monkeypatch.setattr(save, "PROTOBUF_LIMIT", limit)
        save_model(model, tmp_path / str(limit) / "m.onnx")
        assert sorted(p.name for p in (tmp_path / str(limit)).iterdir()) == names
    weights = onnx.load(tmp_path / str(size - 1) / "m.onnx").graph.initializer
    assert [np.frombuffer(w.raw_data, np.float32)[0] for w in weights] == [0, 1, 2, 3]


def test_several_data_files_stay_several(tmp_path: Path) -> None:
    model = _lazy_model([ir.tensor(np.full(512, i, np.float32)) for i in range(5)])
    names = tuple(f"parts/in-{i}-of-3.data" for i in (1, 2, 3))
    (tmp_path / "in").mkdir()
    save_model(model, tmp_path / "in" / "in.onnx", DataLayout(names, shard_bytes=2 * 2048))
    loaded = load_model(tmp_path / "in" / "in.onnx")
    assert loaded.layout == DataLayout(names, 2 * 2048)
    target = _round_trip(tmp_path / "in" / "in.onnx", tmp_path / "out" / "out.onnx")
    written = {p.name: p.stat().st_size for p in (tmp_path / "out" / "parts").iterdir()}
    assert written == {
        "out-1-of-3.data": 4096,
        "out-2-of-3.data": 4096,
        "out-3-of-3.data": 2048,
    }
    weights = onnx.load(target).graph.initializer
    assert [np.frombuffer(w.raw_data, np.float32)[0] for w in weights] == [0, 1, 2, 3, 4]


def test_the_last_data_file_takes_what_the_others_cannot(tmp_path: Path) -> None:
    model = _lazy_model([ir.tensor(np.full(512, i, np.float32)) for i in range(5)])
    save_model(model, tmp_path / "m.onnx", DataLayout(("a.data", "b.data"), shard_bytes=2048))
    assert (tmp_path / "a.data").stat().st_size == 2048
    assert (tmp_path / "b.data").stat().st_size == 4 * 2048
    assert len(onnx.load(tmp_path / "m.onnx").graph.initializer) == 5


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _lazy_model([ir.tensor(np.zeros(512, np.float32))])
    free = disk.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: free)
    for layout in (DataLayout(), DataLayout(("m.data",))):
        with pytest.raises(UsageError, match=r"the disk is full: 2\d\d\d bytes are needed at"):
            save_model(model, tmp_path / "m.onnx", layout)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = _lazy_model([ir.tensor(np.zeros(512, np.float32))])
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(UsageError, match=r"m\.onnx cannot be written: Is a directory"):
        save_model(model, tmp_path / "m.onnx")


_PEAK = """
import resource, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

loaded = load_model(Path(sys.argv[1]))
for value in list(loaded.model.graph.initializers.values())[::2]:
    old = value.const_value
    value.const_value = ir.LazyTensor(
        lambda old=old: ir.Tensor(old.numpy() * np.float32(2)), old.dtype, old.shape
    )
before = peak()
save_model(loaded.model, Path(sys.argv[2]), loaded.layout)
print(peak() - before)
"""


@pytest.mark.parametrize("layout", [DataLayout(), DataLayout(("in.data",))])
def test_saving_needs_the_memory_of_the_largest_weight(tmp_path: Path, layout: DataLayout) -> None:
    tensors = [
        ir.LazyTensor(
            lambda: ir.Tensor(np.zeros(4 * 2**20, np.float32)), ir.DataType.FLOAT, ir.Shape([2**22])
        )
        for _ in range(16)
    ]
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    save_model(_lazy_model(tensors), tmp_path / "in" / "in.onnx", layout)
    arguments = [str(tmp_path / folder / "in.onnx") for folder in ("in", "out")]
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True
    )
    # A weight has 16 MiB, all of them 256: one is mapped and one is new at a time.
    assert int(run.stdout) < 64 * 1024

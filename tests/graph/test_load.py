from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.file_tensor import FileTensor
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.protobuf import length_delimited
from onnx_tricks.graph.save import save_model

_FLOATS = 512


def _model(
    nodes: list[onnx.NodeProto] | None = None,
    initializers: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    """Of one MatMul `y = x @ w`, unless told otherwise."""
    if nodes is None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    if initializers is None:
        initializers = [numpy_helper.from_array(np.ones((16, 32), np.float32), "w")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _save(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def _external(location: str, **entries: object) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16, 32])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return _model(initializers=[tensor])


def _data(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.arange(_FLOATS, dtype=np.float32).tofile(path)
    return path


def _weight(path: Path) -> np.ndarray:
    tensor = load_model(path).model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_weights_are_read_from_the_file_only_when_asked_for(
    tmp_path: Path, rich_model: onnx.ModelProto
) -> None:
    expected = {t.name: numpy_helper.to_array(t) for t in rich_model.graph.initializer}
    del expected["text"]
    loaded = load_model(_save(rich_model, tmp_path / "m.onnx"))
    assert loaded.layout.locations == ()
    for name, array in expected.items():
        tensor = loaded.model.graph.initializers[name].const_value
        assert tensor is not None
        if name != "w.typed" and array.nbytes >= 2048:
            assert isinstance(tensor, FileTensor)
        assert tensor.numpy().shape == array.shape
        assert tensor.numpy().tolist() == array.tolist(), name


def test_external_data_is_mapped_and_its_naming_remembered(
    tmp_path: Path, save_external: Callable[..., Path], rich_model: onnx.ModelProto
) -> None:
    loaded = load_model(save_external(tmp_path / "model.onnx"))
    assert loaded.layout.locations == ("model.onnx_data",)
    assert loaded.layout.renamed("model.onnx", "out.onnx").locations == ("out.onnx_data",)
    tensor = loaded.model.graph.initializers["w.float"].const_value
    assert isinstance(tensor, FileTensor)
    expected = next(t for t in onnx.load(tmp_path / "model.onnx").graph.initializer)
    np.testing.assert_array_equal(tensor.numpy(), numpy_helper.to_array(expected))


@pytest.mark.parametrize(
    ("location", "renamed"),
    [
        ("model.onnx_data", "out.onnx_data"),
        ("model.onnx.data", "out.onnx.data"),
        ("model.data", "out.data"),
        ("parts/model-00001-of-00002.data", "parts/out-00001-of-00002.data"),
        ("weights.bin", "weights.bin"),
    ],
)
def test_data_files_named_after_the_model_follow_its_name(
    tmp_path: Path, location: str, renamed: str
) -> None:
    _data(tmp_path / location)
    loaded = load_model(_save(_external(location), tmp_path / "model.onnx"))
    assert loaded.layout.renamed("model.onnx", "out.onnx").locations == (renamed,)


def test_reading_many_weights_keeps_no_file_open(tmp_path: Path) -> None:
    count = 300
    tensors = [numpy_helper.from_array(np.ones(512, np.float32), f"w{i}") for i in range(count)]
    nodes = [helper.make_node("Sum", ["x", *(t.name for t in tensors)], ["y"])]
    model = load_model(_save(_model(nodes, tensors), tmp_path / "m.onnx")).model
    before = len(list(Path("/proc/self/fd").iterdir()))
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.numpy().sum() == 512
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_layout_of_the_hugging_face_cache_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev" / "onnx"
    snapshot.mkdir(parents=True)
    _save(_external("model.onnx_data", offset=0, length=2048), blobs / "0a")
    _data(blobs / "0b")
    for name, blob in (("model.onnx", "0a"), ("model.onnx_data", "0b")):
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    assert _weight(snapshot / "model.onnx")[0, 5] == 5


def test_hard_linked_data_opens(tmp_path: Path) -> None:
    _data(tmp_path / "elsewhere" / "blob")
    path = _save(_external("w.data"), tmp_path / "m" / "m.onnx")
    (tmp_path / "m" / "w.data").hardlink_to(tmp_path / "elsewhere" / "blob")
    assert _weight(path)[0, 5] == 5


def test_a_model_opens_by_relative_path_and_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _data(tmp_path / "w.data")
    _save(_external("w.data"), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    tensor = load_model(Path("m.onnx")).model.graph.initializers["w"].const_value
    monkeypatch.chdir("/")
    assert tensor is not None
    assert tensor.numpy()[0, 5] == 5


@pytest.mark.parametrize(
    "location",
    ["", ".", "..", "../w.data", "a/../../w.data", "/w.data", "C:\\w.data", "..\\w.data", "a\0b"],
)
def test_a_location_that_leaves_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    _data(tmp_path / "w.data")
    path = _save(_external(location), tmp_path / "m" / "m.onnx")
    with pytest.raises(ModelError, match="not a path within the model's folder"):
        load_model(path)


def test_an_absolute_location_into_the_own_folder_is_refused(tmp_path: Path) -> None:
    data = _data(tmp_path / "w.data")
    with pytest.raises(ModelError, match="not a path within"):
        load_model(_save(_external(str(data)), tmp_path / "m.onnx"))


def test_a_linked_folder_out_of_the_models_folder_is_refused(tmp_path: Path) -> None:
    _data(tmp_path / "elsewhere" / "w.data")
    path = _save(_external("in/w.data"), tmp_path / "m" / "m.onnx")
    (tmp_path / "m" / "in").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="through a link out of the model's folder"):
        load_model(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": -4}, "offset '-4'"),
        ({"offset": "0x10"}, "offset '0x10'"),
        ({"offset": 10**30}, "offset '1000"),
        ({"offset": 2**62}, "has only 2048 bytes"),
        ({"offset": 4}, "has only 2048 bytes: the file is truncated"),
        ({"length": -1}, "length '-1'"),
        ({"length": 1024}, "has 1024 bytes of external data, not 2048"),
        ({"length": 4096}, "has 4096 bytes of external data, not 2048"),
        ({"length": "9" * 5000}, "length '999"),
    ],
)
def test_external_entries_that_disagree_with_the_file_or_the_shape_are_refused(
    tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    _data(tmp_path / "w.data")
    path = _save(_external("w.data", **entries), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="initializer 'w'") as caught:
        load_model(path)
    assert message in str(caught.value)


def test_external_data_of_no_bytes_is_read_and_written_again(tmp_path: Path) -> None:
    _data(tmp_path / "w.data")
    model = _external("w.data")
    empty = model.graph.initializer.add(name="empty", data_type=TensorProto.INT64, dims=[0])
    empty.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "2048"), ("length", "0")):
        empty.external_data.add(key=key, value=value)
    loaded = load_model(_save(model, tmp_path / "m.onnx"))
    save_model(loaded.model, tmp_path / "out.onnx", DataLayout(("out.data",)))
    (written,) = (t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.dims == [0])
    assert numpy_helper.to_array(written).shape == (0,)


def test_the_default_domain_by_its_long_name_is_the_default_domain(tmp_path: Path) -> None:
    model = _model()
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    loaded = load_model(_save(model, tmp_path / "m.onnx")).model
    assert loaded.opset_imports == {"": 18}
    assert loaded.graph[0].domain == ""


@pytest.mark.parametrize(("version", "constant"), [(3, True), (8, False)])
def test_weights_that_are_inputs_too_are_constants_only_in_old_files(
    tmp_path: Path, version: int, constant: bool
) -> None:
    model = _model()
    model.ir_version = version
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 32]))
    loaded = load_model(_save(model, tmp_path / "m.onnx")).model
    weight = loaded.graph.initializers["w"]
    assert (stored_tensor(weight) is not None) is constant
    assert [value.name for value in loaded.graph.inputs] == (["x"] if constant else ["x", "w"])
    assert loaded.ir_version == max(version, 4)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = _save(_external("w.data"), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"w\.data' cannot be read.*belongs beside m\.onnx"):
        load_model(path)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.data")
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(_save(_external("w.data"), tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(tmp_path / "w.data")


def test_files_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    whole = _model().SerializeToString()
    for name, content, message in (
        ("empty", b"", "empty"),
        ("text", b"hello, this is a text and no model at all\n", "not an ONNX model"),
        ("truncated", whole[: len(whole) // 2], "truncated"),
        ("headless", onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
        ("model.ort", bytes([24, 0, 0, 0]) + b"ORTM" + bytes(100), "format .* give the .onnx file"),
        ("zip", b"PK\x03\x04" + bytes(100), "not an ONNX model"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ModelError, match="No such file"):
        load_model(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="not a file"):
        load_model(tmp_path)


def _node(operator: str, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=f"node of {outputs[0]}")


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [_node("Relu", ["h"], ["y"]), _node("MatMul", ["x", "w"], ["h"])]
    model = load_model(_save(_model(nodes), tmp_path / "m.onnx")).model
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu"]


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    nodes = [_node("Add", ["x", "b"], ["a"]), _node("Add", ["x", "a"], ["b"])]
    nodes.append(_node("MatMul", ["b", "w"], ["y"]))
    with pytest.raises(ModelError, match="cycle"):
        load_model(_save(_model(nodes), tmp_path / "m.onnx"))


def test_a_cycle_through_a_subgraph_is_refused(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([_node("Relu", ["y"], [name])], name, [], [output])

    node = helper.make_node("If", ["x"], ["y"], then_branch=branch("t"), else_branch=branch("e"))
    with pytest.raises(ModelError, match="cycle"):
        load_model(_save(_model([node]), tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([_node("MatMul", ["x", "nowhere"], ["y"])], "reads 'nowhere', which nothing defines"),
        ([_node("MatMul", ["x", "w"], ["z"])], "output 'y' .* is defined by nothing"),
        ([_node("MatMul", ["x", "w"], ["y"])] * 2, "defines the value 'y' twice"),
        ([_node("MatMul", ["x", "w"], ["w"])], "defines the value 'w' twice"),
        ([_node("", ["x", "w"], ["y"])], "has no operator"),
    ],
)
def test_names_that_are_undefined_or_ambiguous_are_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(_save(_model(nodes), tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_type": 0}, "has no dtype"),
        ({"data_type": 99}, "unknown dtype 99"),
        ({"dims": [16, 33]}, "has 2048 bytes of raw_data, not 2112"),
        ({"dims": [-16, -32]}, "impossible shape"),
        ({"dims": [2**40, 2**40]}, "impossible shape"),
        ({"dims": [0, 2**62, 2**62]}, "impossible shape"),
        ({"dims": [2**60]}, "has 2048 bytes of raw_data"),
        ({"dims": [1] * 500}, "impossible shape of 500 axes"),
        ({"data_type": TensorProto.STRING}, "strings cannot be raw_data"),
        ({"float_data": [1.0]}, "has its data twice"),
    ],
)
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_weight_whose_bytes_do_not_fit_its_shape_is_refused(
    tmp_path: Path, place: str, fields: dict[str, object], message: str
) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16, 32], raw_data=bytes(2048))
    if "dims" in fields:
        del tensor.dims[:]
    tensor.MergeFrom(TensorProto(**fields))
    if place == "initializer":
        model, where = _model(initializers=[tensor]), "initializer 'w'"
    else:
        nodes = [helper.make_node("Constant", [], ["w"], name="c"), _node("Mul", ["x", "w"], ["y"])]
        nodes[0].attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
        model, where = _model(nodes, []), r"attribute 'value' of node 'c' \(Constant\)"
    with pytest.raises(ModelError, match=f"{where}.*{message}"):
        load_model(_save(model, tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "message"),
    [
        ("MatMul", ["x"], {}, "has 1 inputs, which the operator cannot have"),
        ("MatMul", ["x", "w", "w"], {}, "has 3 inputs"),
        ("MatMul", ["x", ""], {}, "lacks the input 'B'"),
        ("Cast", ["x"], {}, "lacks the attribute 'to'"),
        ("Cast", ["x"], {"to": 1.0}, "attribute 'to' .* is not of the type INT"),
        ("Constant", [], {}, "must have exactly one value"),
        ("Constant", [], {"value_int": 1, "value_float": 1.0}, "must have exactly one value"),
    ],
)
def test_a_node_that_its_operator_does_not_allow_is_refused(
    tmp_path: Path,
    operator: str,
    inputs: list[str],
    attributes: dict[str, object],
    message: str,
) -> None:
    node = helper.make_node(operator, inputs, ["y"], name="n", **attributes)
    with pytest.raises(ModelError, match=rf"node 'n' \({operator}\).*{message}|{message}"):
        load_model(_save(_model([node]), tmp_path / "m.onnx"))


def test_operators_that_onnx_does_not_know_are_left_to_the_runtime(tmp_path: Path) -> None:
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["y"], anything=1)
    assert load_model(_save(_model([node]), tmp_path / "m.onnx"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    content = _model().SerializeToString()
    assert content.count(b"MatMul") == 1
    path = tmp_path / "m.onnx"
    path.write_bytes(content.replace(b"MatMul", b"Mat\xe5ul"))
    with pytest.raises(ModelError, match=r"NodeProto\.op_type holds text that is not UTF-8"):
        load_model(path)


def test_broken_attributes_are_refused(tmp_path: Path) -> None:
    for attribute, message in (
        (AttributeProto(name="a"), "type UNDEFINED"),
        (AttributeProto(name="a", type="INT", f=1.0), "no value of its type"),
        (AttributeProto(name="a", type="TENSOR"), "no value of its type"),
        (AttributeProto(name="a", type="SPARSE_TENSOR"), "not supported"),
        (AttributeProto(type="INT"), "without a name"),
        (AttributeProto(name="a", type="STRINGS", strings=[b"\xff"]), "broken"),
    ):
        model = _model()
        model.graph.node[0].attribute.append(attribute)
        with pytest.raises(ModelError, match=message):
            load_model(_save(model, tmp_path / "m.onnx"))


def test_an_initializer_declared_with_another_shape_is_refused(tmp_path: Path) -> None:
    model = _model()
    model.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 16]))
    with pytest.raises(ModelError, match="declared with another"):
        load_model(_save(model, tmp_path / "m.onnx"))


def test_what_onnx_ir_would_lose_is_refused(tmp_path: Path) -> None:
    sparse, training = _model(), _model()
    sparse.graph.sparse_initializer.add()
    training.training_info.add()
    for model, message in ((sparse, "sparse"), (training, "training")):
        with pytest.raises(ModelError, match=f"{message}.*not supported"):
            load_model(_save(model, tmp_path / "m.onnx"))


def _nested(depth: int) -> bytes:
    """A serialized model whose nodes lie `depth` deep; the onnx package makes none this deep."""

    def field(number: int, payload: bytes) -> bytes:
        return length_delimited(number, len(payload)) + payload

    kind = AttributeProto(name="then_branch", type=AttributeProto.GRAPH).SerializeToString()
    graph = b""
    for _ in range(depth):
        graph = field(1, field(4, b"Nest") + field(7, b"own") + field(5, kind + field(6, graph)))
    return onnx.ModelProto(
        ir_version=8, opset_import=[helper.make_opsetid("", 18)]
    ).SerializeToString() + field(7, graph)


def test_subgraphs_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_nested(20))
    assert len(list(load_model(path).model.graphs())) == 21
    for depth in (100, 1000):
        path.write_bytes(_nested(depth))
        with pytest.raises(ModelError):
            load_model(path)


def test_loading_reads_nothing_of_a_large_data_file(tmp_path: Path) -> None:
    elements = 5 * 2**30 // 4
    model = _external("w.data")
    model.graph.initializer[0].dims[:] = [elements]
    path = _save(model, tmp_path / "m.onnx")
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * elements)  # a hole: nothing is written
    start = time.perf_counter()
    tensor = load_model(path).model.graph.initializers["w"].const_value
    assert time.perf_counter() - start < 5
    assert isinstance(tensor, FileTensor)
    assert tensor.nbytes == 4 * elements


def test_loading_a_large_single_file_takes_no_memory_for_its_weights(tmp_path: Path) -> None:
    megabytes = 100
    weight = np.zeros(megabytes * 2**18, np.float32)
    path = _save(_model(initializers=[numpy_helper.from_array(weight, "w")]), tmp_path / "m.onnx")
    del weight
    script = (
        "import resource, sys; from pathlib import Path; import onnx_tricks.graph.load as load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = load.load_model(Path(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 30 * 1024  # KiB


def test_a_loaded_model_saved_by_onnx_ir_stands_on_its_own(
    tmp_path: Path, save_external: Callable[..., Path]
) -> None:
    model = load_model(save_external(tmp_path / "in" / "model.onnx")).model
    ir.save(model, tmp_path / "copy.onnx")
    copy = onnx.load(tmp_path / "copy.onnx")
    assert all(t.data_location == TensorProto.DEFAULT for t in copy.graph.initializer)
    onnx.checker.check_model(copy)

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_tricks.errors import TricksError, UsageError
from onnx_tricks.graph import staging as staging_module
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.plan import make_plan
from onnx_tricks.graph.staging import Staging
from tests import toys

SaveExternal = Callable[..., Path]
SameModel = Callable[[Path, Path], None]


def _run(source: Path, destination: Path | str, *, commit: bool = True) -> None:
    """What the optimizer does with files, without passes."""
    plan = make_plan(source, destination)
    with Staging(plan) as staging:
        for output in plan.outputs:
            assert output.source is not None
            loaded = load_model(output.source)
            staged = staging.save(loaded.model, output, loaded.layout)
            assert load_model(staged)
        if commit:
            staging.commit()


def _tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _simple(path: Path, location: str | None, fill: float = 1.0) -> Path:
    """A model of one weight, in the file or in a data file."""
    weight = numpy_helper.from_array(np.full(512, fill, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Neg", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])],
        [weight],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    external = {"save_as_external_data": True, "location": location} if location else {}
    onnx.save(helper.make_model(graph, ir_version=10), path, **external)
    return path


def _fill(path: Path) -> float:
    return float(numpy_helper.to_array(onnx.load(path).graph.initializer[0])[0])


def test_a_file_becomes_a_file_and_nothing_else_stays(
    tmp_path: Path, save_external: SaveExternal, assert_same_model: SameModel
) -> None:
    source = save_external(tmp_path / "in" / "model.onnx")
    _run(source, tmp_path / "new" / "deep" / "out.onnx")
    written = tmp_path / "new" / "deep"
    assert sorted(p.name for p in written.iterdir()) == ["out.onnx", "out.onnx_data"]
    assert_same_model(source, written / "out.onnx")


@pytest.mark.parametrize("location", [None, "m.onnx_data", "weights.bin"])
def test_a_file_may_be_its_own_output(tmp_path: Path, location: str | None) -> None:
    source = _simple(tmp_path / "m.onnx", location, fill=3.0)
    names = sorted(p.name for p in tmp_path.iterdir())
    _run(source, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert _fill(source) == 3.0


def test_an_exported_folder_is_carried_along(
    tmp_path: Path, save_external: SaveExternal, assert_same_model: SameModel
) -> None:
    source = tmp_path / "in"
    for name in ("encoder_model.onnx", "onnx/decoder_model.onnx"):
        save_external(source / name)
    for name in ("config.json", "tokenizer/vocab.txt", ".gitattributes", "other/kept.onnx"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "blob").write_text("linked")
    (source / "generation_config.json").symlink_to(tmp_path / "blob")
    (source / "dangling").symlink_to(tmp_path / "nothing")
    _run(source, tmp_path / "out")
    written = _tree(tmp_path / "out")
    expected = _tree_names(source) - {"dangling"}
    assert set(written) == expected
    assert written["generation_config.json"] == b"linked"
    assert not (tmp_path / "out" / "generation_config.json").is_symlink()
    assert written["other/kept.onnx"] == b"other/kept.onnx"
    for name in ("encoder_model.onnx", "onnx/decoder_model.onnx"):
        assert_same_model(source / name, tmp_path / "out" / name)


def _tree_names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def test_a_folder_may_be_its_own_output(tmp_path: Path) -> None:
    shared = tmp_path / "m"
    _simple(shared / "a.onnx", "a.onnx_data", fill=1.0)
    _simple(shared / "b.onnx", None, fill=2.0)
    (shared / "config.json").write_text("{}")
    before = _tree_names(shared)
    _run(shared, shared)
    assert _tree_names(shared) == before
    assert [_fill(shared / name) for name in ("a.onnx", "b.onnx")] == [1.0, 2.0]


def test_models_that_shared_a_data_file_get_one_each(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _simple(source / "a.onnx", "weights.bin", fill=4.0)
    shutil.copy(source / "a.onnx", source / "b.onnx")
    _run(source, tmp_path / "out")
    assert _tree_names(tmp_path / "out") == {"a.onnx", "b.onnx", "weights.bin", "b.onnx.data"}
    _run(source, source)
    assert _tree_names(source) == {"a.onnx", "b.onnx", "a.onnx.data", "b.onnx.data"}
    for folder in (source, tmp_path / "out"):
        assert _fill(folder / "a.onnx") == _fill(folder / "b.onnx") == 4.0


def test_the_data_of_another_model_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    source = _simple(tmp_path / "a.onnx", "weights.bin", fill=5.0)
    before = _tree(tmp_path)
    _run(source, tmp_path / "b.onnx")
    assert before.items() <= _tree(tmp_path).items()
    assert _tree_names(tmp_path) == {*before, "b.onnx", "b.onnx.data"}
    assert _fill(tmp_path / "b.onnx") == 5.0
    with pytest.raises(UsageError, match="holds weights of another model"):
        _run(_simple(tmp_path / "c.onnx", None), tmp_path / "weights.bin")
    assert _fill(source) == 5.0


def test_a_replaced_model_leaves_no_data_behind(tmp_path: Path) -> None:
    for location in ("old.onnx.data", "whatever.bin"):
        target = _simple(tmp_path / "out" / "old.onnx", location)
        _run(_simple(tmp_path / "in.onnx", None, fill=6.0), target)
        assert _tree_names(tmp_path / "out") == {"old.onnx"}
        assert _fill(target) == 6.0


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_file_that_others_read_is_never_taken_for_mere_weights(tmp_path: Path, name: str) -> None:
    source = _simple(tmp_path / "in" / "m.onnx", name, fill=7.0)
    content = (tmp_path / "in" / name).read_bytes()
    for folder in (tmp_path / "out", tmp_path / "in"):
        _run(source.parent, folder)
        assert _tree_names(folder) == {"m.onnx", "m.onnx.data", name}
        assert (folder / name).read_bytes() == content
        assert _fill(folder / "m.onnx") == 7.0


def test_a_snapshot_of_the_hugging_face_cache_is_rewritten_beside_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "rev"
    _simple(snapshot / "model.onnx", "model.onnx_data", fill=8.0)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).rename(blobs / name.encode().hex())
        (snapshot / name).symlink_to(Path("../../blobs") / name.encode().hex())
    before = _tree(blobs)
    _run(snapshot, tmp_path / "out")
    _run(snapshot / "model.onnx", snapshot / "model.onnx")
    assert _tree(blobs) == before
    for folder in (tmp_path / "out", snapshot):
        assert _tree_names(folder) == {"model.onnx", "model.onnx_data"}
        assert not (folder / "model.onnx_data").is_symlink()
        assert _fill(folder / "model.onnx") == 8.0


def test_leaving_without_commit_changes_nothing(tmp_path: Path) -> None:
    source = _simple(tmp_path / "in" / "m.onnx", "m.data")
    _simple(tmp_path / "out" / "m.onnx", "m.data", fill=9.0)
    before = _tree(tmp_path)
    _run(source.parent, tmp_path / "out", commit=False)
    _run(source, tmp_path / "new" / "deep" / "m.onnx", commit=False)
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), Staging(make_plan(source, tmp_path / "out")):
            raise error
    assert _tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("location", [None, "m.onnx_data"])
@pytest.mark.parametrize("interrupted", range(3))
def test_an_interrupted_commit_leaves_the_old_model_or_none_but_never_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str | None, interrupted: int
) -> None:
    source = _simple(tmp_path / "in" / "m.onnx", location, fill=1.0)
    target = _simple(tmp_path / "out" / "m.onnx", location, fill=2.0)
    move, count = staging_module._move, 0

    def failing(old: Path, new: Path) -> None:
        nonlocal count
        if count == interrupted:
            raise KeyboardInterrupt
        count += 1
        move(old, new)

    monkeypatch.setattr(staging_module, "_move", failing)
    try:
        _run(source, target)
    except KeyboardInterrupt:
        assert not target.exists() or _fill(target) == 2.0
    else:
        assert _fill(target) == 1.0
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    source = _simple(tmp_path / "in" / "m.onnx", "m.data")
    (source.parent / "config.json").write_text("{}")
    for path in source.parent.iterdir():
        path.chmod(0o600)
    umask = os.umask(0o027)
    try:
        _run(source.parent, tmp_path / "out")
    finally:
        os.umask(umask)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == {"m.onnx": 0o640, "m.data": 0o640, "config.json": 0o640}


def test_a_destination_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    source = _simple(tmp_path / "m.onnx", None)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "out.onnx", Path("/proc/nowhere/out.onnx")):
        with pytest.raises(UsageError, match="cannot be written"):
            Staging(make_plan(source, wrong)).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    source = _simple(tmp_path / "m.onnx", None)
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        _run(source, tmp_path / "out" / "m.onnx")


def test_a_folder_in_the_way_is_found_before_anything_is_moved(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _simple(source / "m.onnx", None, fill=1.0)
    (source / "config.json").write_text("{}")
    target = _simple(tmp_path / "out" / "m.onnx", None, fill=2.0)
    (tmp_path / "out" / "config.json").mkdir()
    with pytest.raises(UsageError, match=r"config\.json is a folder, and a file is to go there"):
        _run(source, tmp_path / "out")
    assert _fill(target) == 2.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("location", [None, "m.onnx_data"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str | None,
    predicted: bool,
) -> None:
    target = _simple(small_disk / "m.onnx", location, fill=2.0)
    before = _tree(small_disk)
    source = tmp_path / "m.onnx"
    weight = numpy_helper.from_array(np.ones(2**20, np.float32), "w")
    model = onnx.load(_simple(source, None))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2**20
    model.graph.initializer[0].CopyFrom(weight)
    external = {"save_as_external_data": True, "location": location} if location else {}
    onnx.save(model, source, **external)
    if not predicted:
        monkeypatch.setattr("onnx_tricks.graph.save.require_space", lambda *_: None)
    with pytest.raises(TricksError, match="the disk is full"):
        _run(source, target)
    assert _tree(small_disk) == before


def test_a_limit_on_file_sizes_is_an_error_in_words(tmp_path: Path) -> None:
    source = _simple(tmp_path / "in.onnx", None)
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from onnx_tricks.graph.load import load_model\n"
        "from onnx_tricks.graph.save import save_model\n"
        "from onnx_tricks.errors import UsageError\n"
        "model = load_model(Path(sys.argv[1])).model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_model(model, Path(sys.argv[2]))\n"
        "except UsageError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out.onnx")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in run.stdout


def test_a_config_says_what_the_results_are_and_keeps_the_rest(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    onnx.save(toys.model("y = MatMul(x, w)"), source / "model.onnx")
    for folder in (source, target, target):
        text = '{"model_type": "llama", "größe": 3}'
        (source / "config.json").write_text(text, encoding="utf-8")
        plan = make_plan(source, folder)
        with Staging(plan) as staging:
            staging.save(load_model(source / "model.onnx").model, plan.outputs[0])
            staging.describe("onnx_tricks", {"states": {}})
            staging.commit()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config == {"model_type": "llama", "größe": 3, "onnx_tricks": {"states": {}}}


def test_a_config_that_is_none_stays_as_it_is(tmp_path: Path) -> None:
    onnx.save(toys.model("y = MatMul(x, w)"), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text("no json")
    plan = make_plan(tmp_path, tmp_path)
    with Staging(plan) as staging:
        staging.save(load_model(tmp_path / "model.onnx").model, plan.outputs[0])
        staging.describe("onnx_tricks", {})
        staging.commit()
    assert (tmp_path / "config.json").read_text() == "no json"

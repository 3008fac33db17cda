"""The rules that hold the house together."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_tricks
from onnx_tricks.models import demo_path

ROOT = Path(__file__).parents[1]
ENGINE, PASSES, MODELS = ROOT / "onnx_tricks", ROOT / "passes", ROOT / "models"

# For each room, the rooms that it may import besides itself.
MAY_IMPORT = {
    "errors": set(),
    "weights": set(),
    "inverse": set(),
    "rounding": set(),
    "latent": {"inverse", "rounding"},
    "graph": {"errors"},
    "rewrite": {"errors", "graph"},
    "patterns": {"errors", "graph", "weights"},
    "operators": {"graph"},
    "runtime": {"errors", "graph", "operators"},
    "fold": {"graph", "patterns", "weights"},
    "first_layer": {"graph", "patterns", "runtime"},
    "slim": {
        *("errors", "graph", "inverse", "latent", "operators", "patterns"),
        *("rewrite", "rounding", "runtime"),
    },
    "skipless": {"graph", "patterns", "rounding", "weights"},
    "verify": {"errors", "graph", "operators", "rewrite", "runtime"},
    "passes": {
        *("errors", "first_layer", "fold", "graph", "inverse", "operators", "patterns"),
        *("rewrite", "runtime", "skipless", "slim", "weights"),
    },
    "models": {"errors", "graph", "patterns", "rewrite", "weights"},
    "report": {"errors", "graph", "rewrite", "verify"},
    "attempts": {"rewrite", "verify"},
    "run": {"attempts", "errors", "graph", "operators", "report", "rewrite", "verify"},
    "optimizer": {"errors", "models", "passes", "rewrite", "run", "runtime", "verify"},
    "inspect": {"errors", "graph", "models", "optimizer", "passes", "rewrite"},
    "export": {"errors", "models", "optimizer", "rewrite", "runtime"},
    "bench": {"errors", "graph", "models", "runtime", "verify"},
    "terminal": {"errors", "passes", "rewrite"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__init__"] = set(MAY_IMPORT)


def modules() -> Iterator[tuple[str, Path]]:
    """The dotted name and file of each module of the package, links left aside."""
    for prefix, folder in (("", ENGINE), ("passes.", PASSES), ("models.", MODELS)):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if folder is not ENGINE or parts[0] not in {"passes", "models"}:
                yield f"onnx_tricks.{prefix}{'.'.join(parts)}", file


MODULES = dict(modules())
parametrize_modules = pytest.mark.parametrize("name", MODULES)


def imports(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            assert node.module is not None
            # `from onnx_tricks import graph` imports a room as well.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@parametrize_modules
def test_imports_flow_one_way(name: str) -> None:
    room = name.split(".")[1]
    for imported in imports(MODULES[name]):
        package, _, rest = imported.partition(".")
        assert package not in {"passes", "models"}, f"{name} imports {imported}, a second copy"
        if package == "onnx_tricks":
            allowed = {room, *MAY_IMPORT[room]}
            assert rest.split(".")[0] in allowed, f"{name} may not import {imported}"


def test_no_pass_imports_another() -> None:
    for name in (n for n in MODULES if n.startswith("onnx_tricks.passes.") and "__" not in n):
        others = [i for i in imports(MODULES[name]) if i.startswith("onnx_tricks.passes")]
        assert not others, f"{name} imports {others}"


@pytest.mark.parametrize("room", ["inverse", "latent", "rounding", "weights"])
def test_the_algebra_knows_no_graphs(room: str) -> None:
    packages = {i.partition(".")[0] for i in imports(MODULES[f"onnx_tricks.{room}"])}
    packages -= {"onnx_tricks"}  # MAY_IMPORT says which rooms of it
    assert packages <= {
        "__future__",
        "collections",
        "dataclasses",
        "ml_dtypes",
        "numpy",
        "scipy",
        "typing",
    }


@pytest.mark.parametrize(
    "code",
    ["from onnx_tricks.cli import main", "import passes.fold_norm", "from models import demo_path"],
)
def test_a_forbidden_import_is_found(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "load.py"
    file.write_text(code)
    monkeypatch.setitem(MODULES, "onnx_tricks.graph.load", file)
    with pytest.raises(AssertionError):
        test_imports_flow_one_way("onnx_tricks.graph.load")


@parametrize_modules
def test_every_module_says_what_is_public(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    if not any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ImportFrom) for n in tree.body):
        return  # a docstring only
    assigned = [
        t.id
        for n in tree.body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    ]
    assert "__all__" in assigned


@parametrize_modules
def test_every_module_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), name


def test_the_public_names_exist_and_are_documented() -> None:
    for name in onnx_tricks.__all__:
        if not isinstance(public := getattr(onnx_tricks, name), tuple):
            assert public.__doc__, name


def test_the_package_carries_its_data() -> None:
    assert importlib.resources.files("onnx_tricks").joinpath("py.typed").is_file()
    assert {"model.onnx", "config.json"} <= {file.name for file in demo_path().iterdir()}


def test_importing_the_package_does_not_import_torch() -> None:
    for name in ("onnx_tricks", "onnx_tricks.models", "onnx_tricks.cli"):
        importlib.import_module(name)
        file = MODULES.get(name) or MODULES[f"{name}.__init__"]
        assert not any(i.split(".")[0] in {"torch", "transformers"} for i in imports(file))

"""Models cut into graphs: the cache has the shapes that the model makes, or there is none."""

from __future__ import annotations

import pytest

from onnx_tricks.errors import UsageError
from tests.conftest import import_recipes

recipes = import_recipes()
graphs, tiny = recipes.dynamo.graphs, recipes.families.tiny

# Heads and sizes of keys and values: grouped, shared by all, repeated, with positions of their own.
CACHES = {
    "llama": ((2, 16), (2, 16)),
    "gpt_bigcode": ((1, 12), (1, 12)),
    "falcon_new": ((4, 12), (4, 12)),
    "deepseek_v3": ((4, 16), (4, 14)),
}


@pytest.mark.filterwarnings("ignore")  # of other libraries, while a model class is imported
@pytest.mark.parametrize(("name", "shapes"), CACHES.items(), ids=CACHES)
def test_the_cache_is_shaped_as_the_model_shapes_it(name: str, shapes) -> None:
    (graph,) = graphs(tiny(name), cache=True)
    for kind, (heads, size) in zip(("key", "value"), shapes, strict=True):
        example, axes = graph.inputs[f"past_key_values.1.{kind}"]
        assert tuple(example.shape)[1::2] == (heads, size)
        assert set(axes) == {0, 2}
    assert len(graph.inputs) == 2 + 2 * 2
    assert len(graph.outputs) == 1 + 2 * 2


@pytest.mark.parametrize("name", ["openai-gpt", "lfm2"])
def test_a_model_without_such_a_cache_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no cache that holds keys and values alone"):
        graphs(tiny(name), cache=True)

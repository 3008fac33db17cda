"""Models cut into graphs: they compute what the model does, with a cache as it shapes it."""

from __future__ import annotations

import pytest

from onnx_tricks.errors import UsageError
from tests.conftest import import_recipes

recipes = import_recipes()
torch = recipes.export.torch
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


# Text, a spectrogram, a wave, patches of an image, a whole one.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["encoder-decoder", "speech_to_text", "moonshine", "pix2struct", "trocr"]
)
def test_both_sides_compute_what_the_model_does(name: str) -> None:
    model = tiny(name)
    encoder, decoder = graphs(model)
    (main, example), *others = ((n, one) for n, (one, _) in encoder.inputs.items())
    torch.manual_seed(0)
    given = {main: torch.rand(example.shape) if example.is_floating_point() else example + 2}
    if others:
        given["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = torch.arange(3, 13).reshape(2, 5)
    states = encoder.module(*given.values())
    logits = decoder.module(ids, states, *list(given.values())[1:])
    assert encoder.inputs.keys() == given.keys()
    torch.testing.assert_close(logits, model(**given, decoder_input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["decision_transformer", "patchtst", "detr", "flaubert"])
def test_all_tensors_that_a_model_returns_are_outputs(name: str) -> None:
    model = tiny(name)
    (graph,) = graphs(model)
    given = {n: example for n, (example, _) in graph.inputs.items()}
    expected = {n: one for n, one in model(**given).items() if isinstance(one, torch.Tensor)}
    found = dict(zip(graph.outputs, graph.module(*given.values()), strict=True))
    torch.testing.assert_close(found, expected)

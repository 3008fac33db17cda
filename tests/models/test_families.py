"""The tiny models: every gain and bias counts, a seed settles all.

That exports compute what they do is checked by the survey, `tests.coverage`.
"""

from __future__ import annotations

import pytest

from tests.conftest import import_recipes

recipes = import_recipes()
torch = recipes.export.torch
FAMILIES, tiny = recipes.families.FAMILIES, recipes.families.tiny
make_experts_dense = recipes.experts.make_experts_dense


@pytest.mark.filterwarnings("ignore")  # of other libraries, while a model class is imported
@pytest.mark.parametrize("name", FAMILIES)
def test_all_gains_and_biases_are_random(name: str) -> None:
    vectors = [p for p in tiny(name).parameters() if p.ndim == 1 and p.numel() > 1]
    assert all(len(p.unique()) == p.numel() for p in vectors)


def test_dense_experts_compute_what_sparse_ones_do() -> None:
    ids = torch.arange(3, 13).reshape(2, 5)
    for name in ("deepseek_v3", "ernie4_5_moe", "gpt_oss", "mixtral", "phimoe", "qwen2_moe"):
        model = tiny(name)
        before = model(ids).logits
        make_experts_dense(model)
        torch.testing.assert_close(model(ids).logits, before)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = tiny("bert", 1), tiny("bert", 1), tiny("bert", 2)
    ids = torch.arange(3, 13).reshape(2, 5)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not torch.allclose(first(ids).logits, other(ids).logits)


def test_the_seed_settles_random_values_that_are_no_weights() -> None:
    first, second = (dict(tiny("sam").named_buffers()) for _ in range(2))
    assert first
    assert all(torch.equal(one, second[name]) for name, one in first.items())

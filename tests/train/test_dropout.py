"""Keyed dropout: draws are a micro-batch's own, and dropout is what it is in the textbook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.train.dropout import KeyedDropout, LoraDropout

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]


def test_draws_do_not_depend_on_what_shares_the_pass() -> None:
    """Two layers, of different width, draw one after the other."""
    draws = KeyedDropout()
    parts = [(7, 5), (8, 3), (9, 1)]

    def masks(chosen: list[tuple[int, int]]) -> list[torch.Tensor]:
        draws.begin(chosen)
        return [draws.kept(torch.ones(1, sum(n for _, n in chosen), width), 0.3)[0] for width in (40, 64)]

    alone = [masks([part]) for part in parts]
    for layer, together in enumerate(masks(parts)):
        assert torch.equal(together, torch.cat([one[layer] for one in alone]))
    assert not torch.equal(alone[0][0][:3], alone[1][0]), "each has draws of its own"
    draws.begin(parts)
    with pytest.raises(AssertionError, match="other tokens"):
        draws.kept(torch.ones(1, 8, 4), 0.3)


def test_inverted_dropout() -> None:
    """A share of p is zero, the rest is scaled so that the mean stays; gradients go the same way."""
    draws = KeyedDropout()
    layer = LoraDropout(0.2, draws)
    draws.begin([(1, 500)])
    x = torch.ones(1, 500, 200, requires_grad=True)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert float((out == 0).double().mean()) == pytest.approx(0.2, abs=0.005)  # 4 standard deviations of 100,000 draws
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert layer.eval()(x) is x


def test_only_loras_dropout_is_replaced_and_once_for_each_trainer(make_adapted: Make) -> None:
    assert KeyedDropout.install(make_adapted(dropout=0.0)[0].base) is None
    base = make_adapted(dropout=0.1)[0].base.eval()
    first, second = KeyedDropout.install(base), KeyedDropout.install(base)
    found = [module for module in base.modules() if isinstance(module, LoraDropout)]
    assert len(found) == 4 and all(m.draws is second and m.p == 0.1 for m in found) and first is not second
    assert not any(module.training for module in base.modules()), "the mode is kept"

"""One layer called twice: its calls keep the same channels, and what none of them needs is gone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, fingerprint, randomise


def exported(model: nn.Module, x: Tensor, reads: str = "auto") -> nn.Module:
    before = fingerprint(model)
    pruned = upscale.export(model, (x,), reads=reads)  # type: ignore[arg-type]
    assert fingerprint(model) == before
    check_equal(model, pruned, x, batches=(1, 3))
    return pruned


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pyramid(nn.Module):
    """One head on two branches, as detectors have."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.head, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        high, low = (self.out(F.relu(self.norm(self.head(F.relu(f(x)))))) for f in (self.a, self.b))
        return high - 2 * low


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("reads", ["auto", "gather", "baseline"])
def test_a_shared_layer_loses_what_no_call_needs(reads: str, norm: bool) -> None:
    model = randomise(Pyramid(norm).double().eval(), seed=1)
    with torch.no_grad():
        model.head.weight[:, [1, 5]] = 0  # neither branch needs to make them
        model.out.weight[:, [0, 6, 7]] = 0
    pruned = exported(model, image(), reads)
    assert (pruned.a.out_channels, pruned.b.out_channels) == (6, 6)
    assert (pruned.head.in_channels, pruned.head.out_channels, pruned.out.in_channels) == (6, 5, 5)
    if norm:
        assert pruned.norm.num_features == 5


def test_what_one_call_needs_stays_for_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
            self.first, self.second = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(F.relu(self.stem(x))))
            return self.first(x) + self.second(F.relu(self.conv(x)))

    model = randomise(Twice().double().eval(), seed=2)
    with torch.no_grad():
        model.conv.weight[:, 4] = 0
        model.first.weight[:, [4, 5]] = 0
        model.second.weight[:, [2, 4]] = 0
    pruned = exported(model, image())
    # Channel 4 is read by nobody. 5 is read by the second call alone, 2 by the first.
    assert (pruned.conv.in_channels, pruned.conv.out_channels) == (5, 5)
    assert pruned.stem.out_channels == 5


def test_a_constant_at_one_call_is_not_folded_into_the_weight_of_both() -> None:
    model = randomise(Pyramid().double().eval(), seed=3)
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = 0.7  # a constant for one branch only
        model.head.weight[:, 1] = 0
    pruned = exported(model, image())
    assert pruned.head.in_channels == 7


def test_a_weight_with_two_different_uses_keeps_all_its_channels() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mid(self.embed(x))))

    model = randomise(Tied().double().eval(), seed=4)
    with torch.no_grad():
        model.embed.weight[:, [1, 2]] = 0
        model.mid.weight[:, 3] = 0
    pruned = exported(model, torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0)))
    assert pruned.embed.weight is pruned.out.weight and pruned.embed.weight.shape == (9, 6)

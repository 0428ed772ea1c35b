"""Movements of data that a labelling by channel must see through or stop at: windows, gathers, complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.masks import Mask
from support.oracle import check_equal, fingerprint
from support.subjects import dense, image

FUNCTIONS = {
    "im2col": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest exact": lambda x: F.interpolate(x, size=(7, 5), mode="nearest-exact"),
    "complex": lambda x: (
        torch.view_as_real(torch.view_as_complex(x.movedim(1, -1).unflatten(-1, (3, 2)).contiguous()) * (0.6 + 0.8j))
        .flatten(-2)
        .movedim(-1, 1)
    ),
    "windows": lambda x: (
        x.unflatten(2, (3, 4)).unflatten(4, (4, 3)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).mean(0, True)
        + x[..., :4, :3]
    ),
    "channels to batch": lambda x: x.flatten(0, 1).unsqueeze(1).relu().unflatten(0, (-1, 6)).squeeze(2),
    "channels to space": lambda x: x.unflatten(1, (2, 3)).permute(0, 2, 3, 1, 4).flatten(2, 3).repeat(1, 2, 1, 1),
    "gather": lambda x: torch.gather(x, 1, torch.tensor([5, 3, 3, 1, 0, 2]).view(1, 6, 1, 1).expand_as(x)),
    "take along": lambda x: x[:, torch.tensor([0, 0, 1, 5, 4, 3])],
    "tile": lambda x: x.repeat(1, 2, 1, 1)[:, 3:9],
    "narrow of cat": lambda x: torch.cat([x, x * 2], 1).narrow(1, 4, 6),
    "movedim": lambda x: x.movedim(1, 3).contiguous().movedim(3, 1),
    "swapped": lambda x: x.transpose(1, 2).transpose(2, 1),
    "diag": lambda x: x + torch.diag_embed(x.diagonal(dim1=2, dim2=3)),
    "rot": lambda x: x.rot90(1, (2, 3)),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "batch mix": lambda x: x + x.mean(0, keepdim=True),
    "batch as channel": lambda x: x + x.transpose(0, 1).sum(1, keepdim=True).transpose(0, 1),
    "broadcast": lambda x: x + torch.broadcast_to(x.mean((0, 2, 3)).view(1, 6, 1, 1), x.shape),
    "as strided": lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
    "outer": lambda x: x + torch.einsum("nchw,ndhw->ncd", x, x).mean(2)[..., None, None],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_movements(name: str) -> None:
    """Operators without integer kernels, windows, channels that become batch or space."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(FUNCTIONS[name](self.a(x)))

    for mask in (Mask("input", 0.5, 1), Mask("output", 0.5, 2), Mask("both", 0.25, 3)):
        model = dense(Model())
        mask.apply(model)
        before = fingerprint(model)
        pruned = upscale.export(model, (image(),))
        assert fingerprint(model) == before
        check_equal(model, pruned, image())

"""Attention heads, products and gates: channels that lie in blocks, over several dimensions, or meet in a product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, fingerprint, randomise

HEADS, WIDTH, EMBED = 3, 4, 12


class Attention(nn.Module):
    """Attention over ``HEADS`` heads in one of the spellings that libraries use."""

    def __init__(self, style: str, keys: int = HEADS) -> None:
        super().__init__()
        self.style, self.keys = style, keys
        self.stem = nn.Linear(EMBED, EMBED)
        if style in ("unbind", "chunk", "inner"):
            self.qkv = nn.Linear(EMBED, 3 * EMBED)
        else:
            self.q = nn.Linear(EMBED, EMBED)
            self.k, self.v = nn.Linear(EMBED, keys * WIDTH), nn.Linear(EMBED, keys * WIDTH)
        self.proj = nn.Linear(EMBED, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, EMBED)."""
        x = F.gelu(self.stem(x))
        q, k, v = self.heads(x)
        if self.style in ("chunk", "repeat", "einsum"):
            scores = torch.einsum("bhid,bhjd->bhij", q, k) if self.style == "einsum" else q @ k.transpose(-2, -1)
            scores = (scores * WIDTH**-0.5).softmax(-1)
            out = torch.einsum("bhij,bhjd->bhid", scores, v) if self.style == "einsum" else scores @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.style == "grouped")
        return self.proj(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], EMBED))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        if self.style == "unbind":
            return self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        if self.style == "inner":  # the place within a head runs slowest
            return tuple(
                t.view(batch, tokens, WIDTH, HEADS).permute(0, 3, 1, 2) for t in self.qkv(x).split(EMBED, dim=-1)
            )
        if self.style == "chunk":
            return tuple(t.view(batch, tokens, HEADS, WIDTH).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k, v = (
            f(x).view(batch, tokens, n, WIDTH).transpose(1, 2)
            for f, n in ((self.q, HEADS), (self.k, self.keys), (self.v, self.keys))
        )
        if self.style == "rotary":
            q, k = (t * torch.cos(t.new_ones(WIDTH)) + _half_turned(t) for t in (q, k))
        if self.style == "repeat":
            k, v = (t[:, :, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for t in (k, v))
        return q, k, v


def _half_turned(t: Tensor) -> Tensor:
    return torch.cat((-t[..., WIDTH // 2 :], t[..., : WIDTH // 2]), dim=-1)


def exported(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Exported in every reads mode, each checked; the one of ``auto``."""
    made = {}
    before = fingerprint(model)
    for reads in ("auto", "gather", "baseline"):
        made[reads] = upscale.export(model, inputs, reads=reads, **options)
        check_equal(model, made[reads], *inputs, batches=(1, 3))
    assert fingerprint(model) == before
    return made["auto"]


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def attention(style: str, keys: int = HEADS) -> Attention:
    return randomise(Attention(style, keys).double().eval(), seed=1)  # type: ignore[return-value]


@pytest.mark.parametrize("style", ["unbind", "chunk", "apart", "rotary", "einsum"])
def test_a_head_that_the_projection_does_not_read_is_gone(style: str) -> None:
    model = attention(style)
    with torch.no_grad():
        model.proj.weight[:, WIDTH : 2 * WIDTH] = 0
    pruned = exported(model, tokens(2, 5, EMBED))
    assert pruned.proj.in_features == EMBED - WIDTH
    rows = [pruned.qkv.out_features] if hasattr(pruned, "qkv") else [m.out_features for m in (pruned.q, pruned.k)]
    assert rows == ([3 * (EMBED - WIDTH)] if len(rows) == 1 else [EMBED - WIDTH] * 2)
    assert not pruned.report.barriers


def test_a_head_goes_too_where_the_place_within_it_runs_slowest() -> None:
    model = attention("inner")
    with torch.no_grad():
        model.proj.weight[:, :WIDTH] = 0
    pruned = exported(model, tokens(2, 5, EMBED))
    assert pruned.qkv.out_features == 3 * (EMBED - WIDTH)


@pytest.mark.parametrize("style", ["repeat", "grouped"])
def test_heads_that_share_a_key_go_together(style: str) -> None:
    model = attention(style, keys=1)
    with torch.no_grad():
        model.proj.weight[:, :WIDTH] = 0
    pruned = exported(model, tokens(2, 5, EMBED))
    assert (pruned.proj.in_features, pruned.q.out_features, pruned.k.out_features) == (EMBED - WIDTH, EMBED, WIDTH)


def test_single_channels_of_a_head_leave_the_projection_only() -> None:
    model = attention("unbind")
    with torch.no_grad():
        model.proj.weight[:, [1, 6]] = 0
    pruned = exported(model, tokens(2, 5, EMBED))
    gathered = upscale.export(model, (tokens(2, 5, EMBED),), reads="gather")
    assert gathered.proj.in_features == EMBED - 2
    assert pruned.qkv.out_features == 3 * EMBED


def test_multihead_attention_loses_a_head() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(EMBED, EMBED)
            self.attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.attention(x, x, x, need_weights=False)[0]

    model = randomise(Block().double().eval(), seed=2)
    with torch.no_grad():
        model.attention.out_proj.weight[:, WIDTH : 2 * WIDTH] = 0
    pruned = exported(model, tokens(2, 5, EMBED))
    assert tuple(pruned.attention.in_proj_weight.shape) == (3 * (EMBED - WIDTH), EMBED)


class Product(nn.Module):
    """A layer whose weight is used in a product, between two ordinary ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(7, 3)
        rows = kind in ("transposed", "addmm_transposed")
        self.weight = nn.Parameter(torch.ones((7, 8) if rows else (8, 7)))
        self.bias = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.kind == "matmul":
            x = x @ self.weight + self.bias
        elif self.kind == "transposed":
            x = x @ self.weight.T + self.bias
        elif self.kind == "addmm":
            x = torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, (-1, 5))
        elif self.kind == "addmm_transposed":
            x = torch.addmm(self.bias, x.flatten(0, 1), self.weight.t()).unflatten(0, (-1, 5))
        else:
            x = torch.einsum("bnc,co->bno", x, self.weight)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("kind", ["matmul", "transposed", "addmm", "addmm_transposed", "einsum"])
def test_a_product_with_a_parameter_is_a_linear_layer(kind: str) -> None:
    model = randomise(Product(kind).double().eval(), seed=4)
    rows = model.weight.shape == (7, 8)
    with torch.no_grad():
        nn.init.normal_(model.weight)
        nn.init.normal_(model.bias)
        model.head.weight[:, 2] = 0
        (model.weight if rows else model.weight.t())[:, 5] = 0
    pruned = exported(model, tokens(2, 5, 6))
    assert (pruned.stem.out_features, pruned.head.in_features) == (7, 6)
    assert sorted(pruned.weight.shape) == [6, 7]


def test_both_halves_of_a_gate_lose_the_channel_that_nobody_reads() -> None:
    class Gate(nn.Module):
        def __init__(self, split: bool) -> None:
            super().__init__()
            self.split = split
            self.wide, self.narrow = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(x)
            if self.split:
                gate, value = x.chunk(2, dim=-1)
                return self.narrow(F.silu(gate) * value)
            return self.narrow(F.glu(x, dim=-1))

    for split in (False, True):
        model = randomise(Gate(split).double().eval(), seed=5)
        with torch.no_grad():
            model.narrow.weight[:, [2, 5, 6]] = 0
        pruned = exported(model, tokens(2, 5, 6))
        assert (pruned.wide.out_features, pruned.narrow.in_features) == (10, 5)
        assert "gather" not in pruned.report.reads, pruned.report.reads  # each half stays together


def test_pixel_shuffle_takes_whole_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(5, 4, 1))
    model = randomise(model.double().eval(), seed=6)
    with torch.no_grad():
        model[3].weight[:, 3] = 0
    pruned = exported(model, tokens(2, 3, 6, 6))
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("3").in_channels) == (16, 4)
    assert not pruned.report.barriers


def test_a_norm_that_holds_its_activation_keeps_it() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            args = (self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
            return self.act(F.batch_norm(x, *args))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 3))
    model = randomise(model.double().eval(), seed=7)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    pruned = exported(model, tokens(2, 3, 8, 8))
    assert isinstance(pruned.get_submodule("1"), nn.BatchNorm2d) and isinstance(pruned.get_submodule("1").act, nn.ReLU)
    assert pruned.get_submodule("1").num_features == 7

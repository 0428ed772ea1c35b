"""Masks whose reads are all contiguous: the optimiser against brute force, and the masks on networks."""

from __future__ import annotations

import copy
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upscale
from upscale.contiguous import Arrangement, Chain, Piece, Reader, Space, agreed, arrange, free
from upscale.contiguous.transport import assign
from upscale.errors import InputError
from upscale.masking import MaskingManager

from support.vision import build  # isort: skip

# -- the optimiser: arrays only -----------------------------------------------------------------------------------


def chain(*sizes: int, pinned: bool = False) -> Chain:
    edges = np.cumsum([0, *sizes])
    blocks = tuple(np.arange(a, b) for a, b in zip(edges, edges[1:], strict=False))
    return Chain(blocks, np.full(sum(sizes), pinned))


def whole(number: int, scores: np.ndarray) -> Piece:
    return Piece(number, scores, np.ones(len(scores), dtype=bool))


def one_producer(scores: np.ndarray, keep: list[int]) -> Space:
    """Readers (rows) of one tensor."""
    readers = tuple(Reader((whole(0, row),), k) for row, k in zip(scores, keep, strict=True))
    return Space((chain(scores.shape[1]),), readers)


def best_by_brute_force(scores: np.ndarray, keep: list[int]) -> float:
    """Every order, and every interval of it."""
    readers, channels = scores.shape
    best = -np.inf
    for order in permutations(range(channels)):
        value = 0.0
        for r in range(readers):
            row = scores[r, list(order)]
            value += max(row[i : i + keep[r]].sum() for i in range(channels - keep[r] + 1))
        best = max(best, value)
    return best


def check_valid(space: Space, found: Arrangement) -> None:
    """Every reader keeps its number of channels that it sees, side by side in an order that keeps blocks together."""
    for number, reader in enumerate(space.readers):
        total, value = 0, 0.0
        kept = found.kept(space, number)
        for piece, channels, (start, stop) in zip(reader.pieces, kept, found.intervals[number], strict=True):
            assert len(channels) == stop - start
            assert piece.sees[channels].all()
            order = found.orders[piece.chain]
            places = np.flatnonzero(np.isin(order[piece.sees[order]], channels))
            assert len(places) == 0 or np.array_equal(places, np.arange(places[0], places[0] + len(channels)))
            total += len(channels)
            value += piece.scores[channels].sum()
        assert total == reader.keep
        assert found.retained[number] == pytest.approx(value, rel=1e-9, abs=1e-12)
    for one, order in zip(space.chains, found.orders, strict=True):
        assert len(np.unique(order)) == len(order)
        assert np.isin(np.flatnonzero(one.pinned), order).all()
        block_of = np.zeros(one.size, dtype=int)
        for number, block in enumerate(one.blocks):
            block_of[block] = number
        assert (np.diff(block_of[order]) >= 0).all()


@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_best_of_all(seed: int, items: int, kinds: int) -> None:
    random = np.random.default_rng(seed)
    start = np.concatenate([np.arange(min(items, kinds)), random.integers(0, min(items, kinds), max(0, items - kinds))])
    values = random.normal(size=(items, min(items, kinds))).round(1)  # rounded: ties
    found = assign(values, start)
    assert np.array_equal(np.bincount(found), np.bincount(start))
    best = max(values[np.arange(items), list(p)].sum() for p in set(permutations(start.tolist())))
    assert values[np.arange(items), found].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(12))
def test_arrangement_of_few_channels_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    readers, channels = 3 + seed % 2, 5 + (seed % 3 == 0)
    scores = random.random((readers, channels))
    keep = [channels - int(m) for m in random.integers(1, 3, readers)]
    space = one_producer(scores, keep)
    found = arrange(space)
    check_valid(space, found)
    assert found.retained.sum() == pytest.approx(best_by_brute_force(scores, keep), rel=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_two_readers_keep_their_favourites(seed: int, channels: int, data: st.DataObject) -> None:
    scores = np.random.default_rng(seed).random((2, channels))
    keep = [data.draw(st.integers(1, channels)) for _ in range(2)]
    found = arrange(one_producer(scores, keep))
    favourites = sum(np.sort(row)[channels - k :].sum() for row, k in zip(scores, keep, strict=True))
    assert found.retained.sum() == pytest.approx(favourites, rel=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 24), st.integers(1, 6), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_never_less_than_masks_on_which_all_readers_agree(seed: int, channels: int, readers: int, share: float) -> None:
    scores = np.random.default_rng(seed).gamma(2.0, size=(readers, channels))
    keep = channels - int(share * channels)
    space = one_producer(scores, [keep] * readers)
    found = arrange(space)
    check_valid(space, found)
    common = np.argsort(-scores.sum(0), kind="stable")[:keep]
    assert agreed(space).retained.sum() == pytest.approx(scores[:, common].sum(), rel=1e-12)
    assert found.retained.sum() >= scores[:, common].sum() * (1 - 1e-12)
    assert found.retained.sum() <= free(space).sum() * (1 + 1e-12)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Stored concatenations, concatenations that are fused into their readers, and both."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = [draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)) for _ in range(draw(st.integers(1, 3)))]
    chains = tuple(chain(*s, pinned=draw(st.booleans())) for s in sizes)
    readers = []
    for _ in range(draw(st.integers(1, 4))):
        members = draw(st.lists(st.integers(0, len(chains) - 1), min_size=1, max_size=3))  # one may come twice
        pieces = tuple(whole(k, random.normal(size=chains[k].size)) for k in members)
        total = sum(chains[k].size for k in members)
        readers.append(Reader(pieces, draw(st.integers(1, total))))
    return Space(chains, tuple(readers))


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_any_space_gets_intervals_no_worse_than_agreed_ones(space: Space) -> None:
    found, low = arrange(space), agreed(space)
    check_valid(space, found)
    check_valid(space, low)
    assert found.retained.sum() >= low.retained.sum() - 1e-9
    assert found.retained.sum() <= free(space).sum() + 1e-9
    again = arrange(space)
    assert all(np.array_equal(a, b) for a, b in zip(found.orders, again.orders, strict=True))
    assert found.intervals == again.intervals


def test_agreed_masks_of_a_fused_concatenation_are_the_same_for_all_its_readers() -> None:
    """Two producers; one layer reads the first, two read both, all mask half: each channel goes for all or for none."""
    random = np.random.default_rng(0)
    scores = [random.random((3, 4)), random.random((2, 6))]
    chains = (chain(4), chain(6))
    readers = [Reader((whole(0, scores[0][0]),), 2)]
    readers += [Reader((whole(0, scores[0][r + 1]), whole(1, scores[1][r])), 5) for r in range(2)]
    space = Space(chains, tuple(readers))
    first = set(np.argsort(scores[0].sum(0))[2:].tolist())
    second = set(np.argsort(scores[1].sum(0))[3:].tolist())
    kept = [[set(c.tolist()) for c in agreed(space).kept(space, r)] for r in range(3)]
    assert kept == [[first], [first, second], [first, second]]


def test_two_blocks_are_arranged_as_well_as_by_brute_force() -> None:
    random = np.random.default_rng(1)
    scores = random.random((2, 5))
    edges, keep = (chain(3, 2),), 3
    space = Space(edges, tuple(Reader((whole(0, row),), keep) for row in scores))
    best = 0.0
    for left, right, stored in product(permutations([0, 1, 2]), permutations([3, 4]), product([False, True], repeat=5)):
        order = [c for c in (*left, *right) if stored[c]]
        if len(order) >= keep:
            windows = range(len(order) - keep + 1)
            best = max(best, sum(max(row[order][i : i + keep].sum() for i in windows) for row in scores))
    assert agreed(space).retained.sum() <= arrange(space).retained.sum() <= best + 1e-12
    assert arrange(space).retained.sum() >= 0.97 * best  # a search, not a proof


# -- on networks --------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """A residual stream of 12 channels with as many readers as there are branches, and a head."""

    def __init__(self, branches: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(branches))
        self.up = nn.ModuleList(nn.Conv2d(8, 12, 1) for _ in range(branches))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(branches))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, up, norm in zip(self.down, self.up, self.norms, strict=True):
            x = torch.relu(x + norm(up(torch.relu(down(x)))))
        return self.head(x.mean((2, 3)))


class Concatenations(nn.Module):
    """A dense block (fused concatenations) and an inception block (a stored one with three readers)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(3))
        self.dense = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.left, self.right = nn.Conv2d(26, 10, 1), nn.Conv2d(26, 7, 3, padding=1)
        self.one, self.two = nn.Conv2d(17, 4, 1), nn.Conv2d(17, 5, 1)
        self.three = nn.Conv2d(17, 6, 1)
        self.head = nn.Linear(15 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.dense, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        x = torch.cat(features, 1)
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = torch.cat([self.one(x), self.two(x), self.three(x)], 1).relu()
        return self.head(x.flatten(1))


EXAMPLE = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64),)


def made(cls: type[nn.Module], *args: int) -> nn.Module:
    torch.manual_seed(0)
    model = cls(*args).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model


def columns(layer: nn.Module) -> np.ndarray:
    """L2 norm of each input channel's weights."""
    return layer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).numpy()


def readers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {**{f"down.{i}": m for i, m in enumerate(model.down)}, "head": model.head}


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.8])
def test_every_reader_of_a_stream_keeps_neighbours_of_one_order(amount: float) -> None:
    model = made(Stream)
    manager = MaskingManager(model, method="contiguous", example_inputs=EXAMPLE).importance("l2").mask(amount)
    (laid_out,) = [s for s in manager.laid_out if len(s.view.readers) > 1]
    (order,) = laid_out.arrangement.orders  # one producer: numbers are the stream's own channels
    for name, layer in readers_of(model).items():
        kept = np.flatnonzero(columns(layer))
        assert len(kept) == 12 - int(amount * 12), name
        places = np.sort([order.tolist().index(c) for c in kept])
        assert np.array_equal(places, np.arange(places[0], places[0] + len(kept))), name
        assert sorted(set(range(12)) - set(kept.tolist())) == manager.masked.get(name, torch.tensor([])).tolist()
    for up in model.up:  # on its own: the lowest of its eight channels
        assert int((columns(up) == 0).sum()) == int(amount * 8)
    assert manager.skipped == {"stem": "reads a model input"}


def test_the_export_of_a_stream_reads_slices_only() -> None:
    model = made(Stream, 2)
    MaskingManager(model, method="contiguous", example_inputs=EXAMPLE).mask(0.25)
    pruned = upscale.export(model, EXAMPLE)
    assert set(pruned.report.reads) <= {"whole", "view"}
    torch.testing.assert_close(pruned(*EXAMPLE), model(*EXAMPLE), rtol=1e-10, atol=1e-10)


def test_resnet18_reads_slices_only_and_every_stage_has_one_order() -> None:
    model, example = build("resnet18"), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    manager = MaskingManager(model, method="contiguous", example_inputs=example).mask(0.25)
    orders = {s.view.readers[0].layer: s.arrangement.orders[0].tolist() for s in manager.laid_out}
    stages = {
        "layer1.0.conv1": ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"),
        "layer2.1.conv1": ("layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0"),
        "layer3.1.conv1": ("layer3.1.conv1", "layer4.0.conv1", "layer4.0.downsample.0"),
        "layer4.1.conv1": ("layer4.1.conv1", "fc"),
    }
    for first, names in stages.items():
        for name in names:
            norms = columns(model.get_submodule(name))
            kept = np.flatnonzero(norms)
            assert len(kept) == len(norms) - len(norms) // 4
            places = np.sort([orders[first].index(c) for c in kept])
            assert np.array_equal(places, np.arange(places[0], places[0] + len(kept))), name
    assert set(upscale.export(model, (example,)).report.reads) == {"whole", "view"}


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("cls", [Stream, Concatenations])
@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_exported_and_masked_model_agree(cls: type[nn.Module], amount: float, is_global: bool) -> None:
    model = made(cls)
    manager = MaskingManager(model, method="contiguous", is_global=is_global, example_inputs=EXAMPLE).mask(amount)
    pruned = upscale.export(model, EXAMPLE)
    other = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(pruned(other), model(other), rtol=1e-10, atol=1e-10)
    retained = manager.retained
    assert retained.constrained - 1e-9 <= retained.contiguous <= retained.unconstrained + 1e-9


def test_retained_importance_is_the_sum_of_what_is_left() -> None:
    before = made(Stream)
    model = copy.deepcopy(before)
    manager = MaskingManager(model, method="contiguous", example_inputs=EXAMPLE).importance("l2").mask(0.25)
    scores = {name: columns(layer) for name, layer in readers_of(before).items()}
    common = np.argsort(-sum(scores.values()))[:9]
    (space,) = [s for s in manager.retained.spaces if len(s.layers) > 1]
    assert sorted(space.layers) == sorted(scores)
    assert space.sizes == ((9, 12),) * 4
    assert space.total == pytest.approx(sum(s.sum() for s in scores.values()))
    assert space.constrained == pytest.approx(sum(s[common].sum() for s in scores.values()))
    assert space.unconstrained == pytest.approx(sum(np.sort(s)[3:].sum() for s in scores.values()))
    assert space.contiguous == pytest.approx(sum(columns(layer).sum() for layer in readers_of(model).values()))
    assert space.constrained < space.contiguous < space.unconstrained
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m is not model.stem]
    assert manager.retained.contiguous == pytest.approx(sum(columns(m).sum() for m in layers))
    closed = (space.contiguous - space.constrained) / (space.unconstrained - space.constrained)
    assert manager.retained.closed == pytest.approx(closed)  # layers on their own have no gap
    assert f"{100 * closed:.0f} %" in str(manager.retained)


def test_equal_readers_keep_what_constrained_masks_keep() -> None:
    """With the same scores for all readers there is nothing to gain: the same channels go as by constrained masks."""
    model = made(Stream)
    for down in model.down[1:]:
        down.load_state_dict(model.down[0].state_dict())
    model.head = nn.Conv2d(12, 5, 1).double()
    model.forward = lambda x: _stream_without_head(model, x)
    nn.init.zeros_(model.head.weight)
    other = copy.deepcopy(model)
    other.forward = lambda x: _stream_without_head(other, x)
    MaskingManager(model, method="contiguous", example_inputs=EXAMPLE).mask(0.25)
    MaskingManager(other, method="constrained", example_inputs=EXAMPLE).mask(0.25)
    for down, same in zip(model.down, other.down, strict=True):
        assert torch.equal(down.weight, same.weight)


def _stream_without_head(model: nn.Module, x: Tensor) -> Tensor:
    x = model.stem(x)
    for down, up, norm in zip(model.down, model.up, model.norms, strict=True):
        x = torch.relu(x + norm(up(torch.relu(down(x)))))
    return model.head(x).mean((2, 3))


def test_global_masks_have_the_sizes_of_unconstrained_ones() -> None:
    model, other = made(Stream), made(Stream)
    for m in (model, other):
        with torch.no_grad():
            m.down[0].weight[:, ::2] *= 0.1  # so that layers lose different numbers
    masked = MaskingManager(model, method="contiguous", is_global=True, example_inputs=EXAMPLE).mask(0.3).masked
    wanted = MaskingManager(other, is_global=True, example_inputs=EXAMPLE).mask(0.3).masked
    assert {n: len(c) for n, c in masked.items()} == {n: len(c) for n, c in wanted.items()}
    assert len({len(c) for c in masked.values()}) > 1


def test_a_flattened_channel_is_masked_with_all_its_pixels() -> None:
    model = made(Concatenations)
    manager = MaskingManager(model, method="contiguous", example_inputs=EXAMPLE).mask(0.4)
    pixels = (model.head.weight == 0).all(0).view(15, 16)
    assert torch.equal(pixels.all(1), pixels.any(1))
    assert int(pixels.all(1).sum()) == 6
    assert len(manager.masked["head"]) == 6 * 16


class Norm(nn.Module):
    """A stream that a layer norm reads whole, and a model output that shows another layer's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, 10), nn.LayerNorm(10)
        self.one, self.two, self.three = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(10, 6)
        self.grouped = nn.Conv1d(6, 6, 1, groups=3)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x))
        z = self.one(y) * self.two(y) + self.three(y)
        z = self.grouped(z.unsqueeze(-1)).squeeze(-1)
        return self.last(z), z


def test_what_is_read_whole_stays_and_what_is_not_free_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Norm().double().eval()
    example = torch.randn(2, 3, dtype=torch.float64)
    manager = MaskingManager(model, method="contiguous", example_inputs=example).mask(0.3)
    assert {name: len(c) for name, c in manager.masked.items()} == {"one": 3, "two": 3, "three": 3}
    assert set(manager.skipped) == {"stem", "grouped", "last"}
    assert manager.skipped["last"] == "reads a tensor whose channels stay in their order"
    pruned = upscale.export(model, (example,))
    torch.testing.assert_close(pruned(example), model(example), rtol=1e-10, atol=1e-10)


def test_the_output_side_and_unknown_methods_are_refused() -> None:
    model = made(Stream)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="side='input'"):
        MaskingManager(model, side="output", method="contiguous", example_inputs=EXAMPLE)
    with pytest.raises(InputError, match="'contiguous'"):
        MaskingManager(model, method="adjacent", example_inputs=EXAMPLE)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_model_whose_graph_cannot_be_seen_is_refused() -> None:
    with pytest.raises(InputError, match="example_inputs="):
        MaskingManager(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)), method="contiguous")

"""Plans for a setting: batch, memory format, backend. Whatever is chosen, the numbers are the masked model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, randomise
from upscale import InputError, Target
from upscale.capture import capture


class Readers(nn.Module):
    """A tensor with three readers of different masks, a joined tensor, and a residual addition."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.three = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.last = nn.Conv2d(3 * width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        one, two = self.one(y), self.two(y)
        return self.last(torch.cat([one + y, two, self.three(y)], 1).relu())


@torch.no_grad()
def masked(width: int = 32) -> nn.Module:
    model = randomise(Readers(width).double().eval())
    generator = torch.Generator().manual_seed(1)
    for layer in (model.one, model.two, model.three[2], model.last):
        inputs = layer.weight.shape[1]
        layer.weight[:, torch.randperm(inputs, generator=generator)[: inputs // 2]] = 0
    return model


def image(batch: int, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


TARGETS = [
    Target(batch=1),
    Target(batch=8),
    Target(batch=8, memory_format="channels_last"),
    Target(backend="compile"),
    Target(backend="onnxruntime", batch=4),
    Target(device="cuda", batch=64),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dynamic", [None, "spatial"])
def test_every_plan_computes_the_same(target: Target, dynamic: str | None) -> None:
    model = masked()
    pruned = upscale.export(model, (image(2),), target=target, dynamic_shapes=dynamic)
    for batch, size in ((1, 16), (3, 16 if dynamic is None else 20)):
        check_equal(model, pruned, image(batch, size))
    assert pruned.last.weight.shape[1] < 96


def test_the_memory_format_of_model_and_example_is_kept() -> None:
    """Weights that were channels-last stay so, and what is gathered is channels-last too: nothing is converted."""
    model = masked().to(memory_format=torch.channels_last)
    x = image(4).contiguous(memory_format=torch.channels_last)
    pruned = upscale.export(model, (x,))
    for name, weight in pruned.named_parameters():
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last), name
    check_equal(model, pruned, x)
    assert pruned(x).is_contiguous(memory_format=torch.channels_last)
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_check_channels_last)
    pruned(x)


def _check_channels_last(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    strides = args[0].stride()
    assert strides[1] == 1, f"{module} reads {strides}"


class Many(nn.Module):
    """Six readers of one tensor, each with a mask of its own: four of them cannot have their channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 1)
        self.readers = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return torch.cat([reader(y) for reader in self.readers], 1)


@torch.no_grad()
def test_a_gather_of_neighbouring_channels_is_one_of_table_rows() -> None:
    """In channels-last memory: the plan says so, and what is gathered is channels-last like everything else."""
    model = randomise(Many().double().eval()).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    for reader in model.readers:
        reader.weight[:, torch.randperm(64, generator=generator)[:32]] = 0
    x = image(4, 24).contiguous(memory_format=torch.channels_last)
    pruned = upscale.export(model, (x,))
    gathers = [r for by in pruned.report.plan.reads.values() for r in by.values() if r.kind == "gather"]
    assert gathers and all(read.innermost for read in gathers)
    check_equal(model, pruned, x)
    for reader in pruned.readers:
        reader.register_forward_pre_hook(_check_channels_last)
    pruned(x)


class Pooled(nn.Module):
    """Three readers of one tensor, one of them through a pooling over all places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 256, 1)
        self.one, self.two = (nn.Conv2d(256, 64, 3, padding=1) for _ in range(2))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(256, 256, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return (self.one(y) + self.two(y)).mean((1, 2, 3)) + self.pooled(y).sum((1, 2, 3))


@torch.no_grad()
def test_a_pooled_tensor_is_read_from_behind_the_pooling() -> None:
    """There the gather costs next to nothing, and without the pooling's reader the other two read slices."""
    model = randomise(Pooled().double().eval())
    generator = torch.Generator().manual_seed(0)
    for reader in (model.one, model.two, model.pooled[1]):
        reader.weight[:, torch.randperm(256, generator=generator)[:128]] = 0
    x = image(4, 24)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    nodes = capture(pruned, (x,)).graph.nodes
    assert [n.args[0].meta["val"].shape[2:] for n in nodes if "index_select" in str(n.target)] == [(1, 1)]
    assert pruned.report.reads["view"] == 2
    assert "movedim" not in pruned.code, "one place: there are no rows of a table"


@torch.no_grad()
def test_a_read_that_costs_more_than_it_saves_is_not_done() -> None:
    """Three readers of a large tensor with few outputs each: picking costs more than multiplying by zeros."""
    model = randomise(Readers(width=16).double().eval())
    model.one, model.two = nn.Conv2d(16, 16, 1).double(), nn.Conv2d(16, 16, 1).double()
    model.three[2] = nn.Conv2d(16, 16, 1).double()
    for layer, gone in ((model.one, [0, 3, 6]), (model.two, [1, 4, 7]), (model.three[2], [2, 5, 8])):
        layer.weight[:, gone] = 0
    x = image(8, 64)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    kept = {layer: channels for layer, side, channels, _ in pruned.report.kept if side == "input"}
    assert kept, "no layer was left as it was"
    for layer, channels in kept.items():
        assert pruned.get_submodule(layer).weight.shape[1] == 13 + channels
    gathered = upscale.export(model, (x,), reads="gather")
    assert {m.weight.shape[1] for m in (gathered.one, gathered.two)} == {13}


class Chains(nn.Module):
    """Readers that see a tensor, or two joined, through a batch norm and an activation of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.chains = nn.ModuleList(self.chain(32) for _ in range(4))
        self.join = self.chain(64)

    @staticmethod
    def chain(width: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        z = self.other(y)
        return sum(chain(y) for chain in self.chains) + self.join(torch.cat([y, z], 1)), z


@torch.no_grad()
def test_a_chain_whose_read_costs_more_than_it_saves_is_left_as_it_was() -> None:
    model = randomise(Chains().double().eval())
    for i, chain in enumerate(model.chains):
        chain[2].weight[:, [i, i + 4, i + 9]] = 0
    x = image(8, 64)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    left = {layer: channels for layer, side, channels, _ in pruned.report.kept}
    assert left and set(left.values()) == {3} and set(left) < {f"chains.{i}.2" for i in range(4)}
    for layer in left:
        norm = pruned.get_submodule(layer.removesuffix("2") + "0")
        assert pruned.get_submodule(layer).in_channels == norm.num_features == 32
    assert all("µs" in reason for *_, reason in pruned.report.kept)
    picked = upscale.export(model, (x,), reads="gather")
    assert {picked.get_submodule(layer).in_channels for layer in left} == {29}


@pytest.mark.parametrize("multiple", [4, 8, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_counts_are_multiples_where_asked(multiple: int, memory_format: torch.memory_format) -> None:
    model = masked(width=48).to(memory_format=memory_format)
    with torch.no_grad():
        for layer in (model.one, model.two, model.three[2]):
            layer.weight[[3, 5, 11]] = 0  # rows too
            layer.bias[[3, 5, 11]] = 0
    x = image(2).contiguous(memory_format=memory_format)
    pruned = upscale.export(model, (x,), target=Target(round_to=multiple))
    check_equal(model, pruned, x)
    before, exact = dict(model.named_modules()), upscale.export(model, (x,))
    for name, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d) and name != "last":
            assert layer.out_channels % multiple == 0 or layer.out_channels == before[name].out_channels
            assert layer.in_channels % multiple == 0 or layer.in_channels == before[name].in_channels
            assert 0 <= layer.in_channels - exact.get_submodule(name).in_channels < multiple
    assert any("multiple" in reason for *_, reason in pruned.report.kept)
    assert not any("multiple" in reason for *_, reason in exact.report.kept)


@pytest.mark.parametrize(("size", "gone", "left"), [(32, 3, 64), (32, 12, 52), (4, 3, 61)])
@torch.no_grad()
def test_a_large_layer_that_loses_few_channels_keeps_a_multiple(size: int, gone: int, left: int) -> None:
    """61 channels of 64 take longer than 64; in a small layer nobody could tell."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).double().eval())
    model[2].weight[:, :gone] = 0
    x = image(2, size)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("2").in_channels) == (left, left)
    assert any("multiple" in reason for *_, reason in pruned.report.kept) == (left == 64)
    gathered = upscale.export(model, (x,), reads="gather")
    assert gathered.get_submodule("2").in_channels == 64 - gone


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": 0},
        {"batch": 1.5},
        {"batch": True},
        {"memory_format": "nhwc"},
        {"backend": "tvm"},
        {"device": "tpu"},
        {"round_to": 0},
    ],
)
def test_a_wrong_target_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"Target\\({next(iter(arguments))}="):
        Target(**arguments)  # type: ignore[arg-type]


def test_the_papers_class_takes_a_target_too() -> None:
    model = masked(width=48)
    reference = copy.deepcopy(model)
    pruned = upscale.PruningManager(model).compute([image(2)]).prune(target=Target(round_to=16))
    check_equal(reference, pruned, image(2))
    assert pruned.two.in_channels == 32 and upscale.export(reference, (image(2),)).two.in_channels == 24


def test_something_else_than_a_target_is_refused() -> None:
    with pytest.raises(InputError, match="upscale.Target"):
        upscale.export(masked(), (image(2),), target="cuda")  # type: ignore[arg-type]


class Residual(nn.Module):
    """Layers on one stream that want different channels of it, so that no order serves all by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 24, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x.mean((2, 3))


def many_readers() -> Residual:
    torch.manual_seed(0)
    model = randomise(Residual().double().eval())
    with torch.no_grad():
        for seed, layer in enumerate(model.layers):
            layer.weight[:, torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:12]] = 0
    return model  # type: ignore[return-value]


def copying_reads(model: nn.Module) -> int:
    reads = model.report.plan.reads.values()
    return sum(read.kind in ("gather", "concat", "collect") for by_operand in reads for read in by_operand.values())


def test_where_calls_take_longer_than_the_work_no_call_is_added() -> None:
    """On a GPU the host calls on while the device works: for one small image a smaller layer saves nothing."""
    model, x = many_readers(), image(2)
    work_bound = upscale.export(model, (x,), target=Target(device="cuda", batch=1 << 17))
    assert copying_reads(work_bound) > 0
    check_equal(model, work_bound, x)
    call_bound = upscale.export(model, (x,), target=Target(device="cuda", batch=1))
    assert copying_reads(call_bound) == 0
    check_equal(model, call_bound, x)
    assert any("more than it saves" in reason or "costs" in reason for *_, reason in call_bound.report.kept)


@pytest.mark.parametrize("target", [Target(device="cuda"), Target(device="cuda", batch=1, backend="cudagraphs")])
def test_calls_are_not_what_counts_unless_a_batch_is_named_in_eager_mode(target: Target) -> None:
    model = many_readers()
    pruned, like = (
        upscale.export(model, (image(1, 224),), target=t) for t in (target, Target(device="cuda", batch=512))
    )
    assert copying_reads(pruned) == copying_reads(like) > 0

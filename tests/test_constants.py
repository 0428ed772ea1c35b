"""Constants are exact: one small network for each rule about what a zero row leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.masks import zero_input, zero_output
from support.oracle import check_equal, parameter_count, randomise
from support.parts import ACTS, Map

SPATIAL = (2, 3, 9, 9)


def image(*shape: int) -> Tensor:
    """A random float64 input, (2, 3, 9, 9) unless told otherwise."""
    return torch.randn(shape or SPATIAL, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ready(model: nn.Module, seed: int = 3) -> nn.Module:
    """float64, eval, random biases and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return randomise(model.double().eval(), seed)


def zero_rows(layer: nn.Module, channels: list[int], bias: bool = False) -> None:
    """Zero the layer's rows; its bias stays unless ``bias``."""
    with torch.no_grad():
        for channel in channels:
            zero_output(layer, channel, bias)


def zero_columns(layer: nn.Module, channels: list[int]) -> None:
    """Make the layer ignore these inputs."""
    with torch.no_grad():
        for channel in channels:
            zero_input(layer, channel)


def prove(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """Export with automatic reads and in one of the other two ways, check both, and give back the first."""
    inputs = inputs or (image(),)
    exported = {}
    for reads in ("auto", ("gather", "baseline")[parameter_count(model) % 2]):
        exported[reads] = upscale.export(model, inputs, reads=reads, **options)
        check_equal(model, exported[reads], *inputs)
        assert parameter_count(exported[reads]) <= parameter_count(model)
    return exported["auto"]


def layer(pruned: nn.Module, index: int) -> Any:
    """A layer of an exported ``nn.Sequential``: a GraphModule itself cannot be indexed."""
    return pruned.get_submodule(str(index))


class Body(nn.Module):
    """``first`` makes channels of which some are masked, ``middle`` is what they go through, ``last`` reads them."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | nn.Module, last: nn.Module, first: nn.Module | None = None):
        super().__init__()
        self.first = first or nn.Conv2d(3, 6, 3, padding=1)
        if isinstance(middle, nn.Module):
            self.middle = middle
        else:
            self.function = middle
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """First, middle, last."""
        x = self.first(x)
        return self.last(self.middle(x) if hasattr(self, "middle") else self.function(x))


LAST = {
    "padding 0": lambda: nn.Conv2d(6, 4, 3),
    "zeros": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "same": lambda: nn.Conv2d(6, 4, 3, padding="same"),
    "circular": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"),
    "no bias": lambda: nn.Conv2d(6, 4, 3, bias=False),
    "norm after": lambda: nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "norm after padding": lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2),
    "transposed, padded": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)),
    "depthwise x2": lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1)),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "flatten, linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 81, 5)),
    "pool, linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("act", ["relu", "sigmoid"])
def test_constant_at_every_consumer(last: str, act: str) -> None:
    """Rows 1, 4 are zero: with a bias left and without, what stands there is folded or kept, exactly."""
    for keep_bias in (True, False):
        model = ready(Body(ACTS[act](6), LAST[last]()))
        zero_rows(model.first, [1, 4], bias=not keep_bias)
        if keep_bias:
            model.first.bias.data[[1, 4]] = torch.tensor([0.6, 0.3], dtype=torch.float64)
        prove(model)


@pytest.mark.parametrize("last", ["padding 0", "norm after", "flatten, linear", "pool, linear"])
def test_constants_that_can_be_folded_are_folded(last: str) -> None:
    """No channel stays for a constant that a linear layer, an unpadded convolution or a norm can take up."""
    model = ready(Body(nn.Sigmoid(), LAST[last]()))
    zero_rows(model.first, [1, 4])
    pruned = prove(model)
    assert pruned.first.out_channels == 4
    assert set(pruned.state_dict()) <= set(model.state_dict())


def test_folding_into_a_norm_keeps_the_keys() -> None:
    """A convolution without bias stays without: the batch norm behind it takes the constant."""
    model = ready(Body(nn.Sigmoid(), LAST["norm after"]()))
    zero_rows(model.first, [0, 5])
    pruned = prove(model)
    assert pruned.last[0].bias is None and pruned.last[0].in_channels == 4
    assert not torch.equal(pruned.last[1].running_mean, model.last[1].running_mean)


@pytest.mark.parametrize("name", sorted(ACTS))
def test_every_activation_is_evaluated(name: str) -> None:
    """f(0) and f(bias) are computed, never assumed to be zero, in front of padding too."""
    for last in ("padding 0", "zeros"):
        model = ready(Body(ACTS[name](6), LAST[last]()))
        zero_rows(model.first, [2, 3], bias=True)
        zero_rows(model.first, [5])
        prove(model)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "avg include": lambda: nn.AvgPool2d(3, 1, 1),
    "avg exclude": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "avg ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "avg ceil include": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg divisor": lambda: nn.AvgPool2d(2, 1, divisor_override=3),
    "avg divisor ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
    "avg divisor padding": lambda: nn.AvgPool2d(3, 1, 1, divisor_override=2, count_include_pad=False),
    "max": lambda: nn.MaxPool2d(3, 2, 1),
    "max ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(4),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(4),
    "lp": lambda: nn.LPPool2d(2, 2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "zero pad": lambda: nn.ZeroPad2d(1),
    "constant pad": lambda: nn.ConstantPad2d(1, 0.8),
    "reflect pad": lambda: nn.ReflectionPad2d(2),
    "circular pad": lambda: nn.CircularPad2d(1),
    "crop": lambda: nn.ConstantPad2d(-1, 0.0),
    "norm": lambda: nn.BatchNorm2d(6),
    "norm then act": lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()),
    "norm of data": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(6),
    "instance affine": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance stats": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 6),
    "group 1": lambda: nn.GroupNorm(1, 6),
    "group each": lambda: nn.GroupNorm(6, 6),
    "local response": lambda: nn.LocalResponseNorm(3),
    "layer, space": lambda: nn.LayerNorm([9, 9]),
    "layer, all": lambda: nn.LayerNorm([6, 9, 9]),
    "softmax channels": lambda: nn.Softmax(dim=1),
    "log softmax space": lambda: nn.LogSoftmax(dim=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise transposed": lambda: nn.ConvTranspose2d(6, 6, 3, 2, 1, groups=6),
    "dropout": lambda: nn.Dropout2d(0.5),
    "prelu": lambda: nn.PReLU(6),
    "shuffle": lambda: nn.ChannelShuffle(3),
    "glu": lambda: nn.Sequential(nn.Conv2d(6, 12, 1), nn.GLU(1)),
}


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.parametrize("padding", [0, 1])
def test_constant_through_every_layer(name: str, padding: int) -> None:
    """Zero and constant channels pass pooling, padding, resampling and norms as the operator's arithmetic says."""
    for negative in (False, True):
        model = ready(Body(MIDDLES[name](), nn.Conv2d(6, 4, 3, padding=padding)))
        zero_rows(model.first, [0, 3], bias=True)
        zero_rows(model.first, [5])
        model.first.bias.data[5] = -0.7 if negative else 0.7
        prove(model)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad value": lambda x: F.pad(x, (1, 1, 1, 1), value=0.4),
    "pad value equal to the constant": lambda x: F.pad(x, (1, 1, 1, 1), value=0.5),
    "pad one side": lambda x: F.pad(x, (0, 2, 1, 0)),
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "amax over channels": lambda x: x - x.amax(1, keepdim=True),
    "sum over channels": lambda x: x * x.sum(1, keepdim=True),
    "mean over space": lambda x: x - x.mean((2, 3), keepdim=True),
    "amax over space": lambda x: x * x.amax((2, 3), keepdim=True),
    "var over space": lambda x: x / (x.var((2, 3), keepdim=True) + 1),
    "sum over space": lambda x: x + x.sum((2, 3), keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "one minus": lambda x: 1 - x,
    "exp": torch.exp,
    "divide": lambda x: x / (x + 5),
    "compare": lambda x: torch.where(x >= 0, x, -x + 1),
    "own square": lambda x: x * x,
    "spatial roll": lambda x: x.roll(2, 3) + x,
    "channel roll": lambda x: x.roll(1, 1) + x,
    "flip": lambda x: x.flip(1) + x,
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1).values,
    "grid": lambda x: x * torch.linspace(0, 1, 9, dtype=x.dtype),
    "per channel constant": lambda x: x * torch.arange(6, dtype=x.dtype).view(6, 1, 1),
    "clamp": lambda x: x.clamp(0.1, 0.9),
    "power": lambda x: (x + 4) ** 1.5,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "write": lambda x: torch.slice_scatter(x, x[:, :2] * 2 + 1, 1, 1, 3),
    "diagonal": lambda x: x + torch.eye(9, dtype=x.dtype),
    "argmax": lambda x: x * (x.argmax(1, keepdim=True) + 1),
    "new channels": lambda x: torch.cat([x, x.mean(1, keepdim=True)], 1)[:, 1:],
    "ones": lambda x: x + torch.ones_like(x),
    "zeros": lambda x: torch.cat([torch.zeros_like(x[:, :3]), x[:, 3:]], 1),
    "unfold": lambda x: x.unfold(2, 3, 1).sum(-1),
    "interpolate": lambda x: F.interpolate(x, size=(13, 7), mode="bilinear", align_corners=False),
    "fft": lambda x: torch.fft.fft2(x).real,
    "matmul space": lambda x: x @ x.transpose(2, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constant_through_every_function(name: str) -> None:
    """The same for what people write in ``forward``."""
    for keep_bias in (False, True):
        model = ready(Body(FUNCTIONS[name], nn.Conv2d(6, 4, 3, padding=1)))
        zero_rows(model.first, [1, 2], bias=True)
        zero_rows(model.first, [4], bias=not keep_bias)
        model.first.bias.data[4] = 0.5 if keep_bias else 0.0
        zero_columns(model.last, [0])
        prove(model)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_with_dead_input_emits_its_bias(multiplier: int, bias: bool) -> None:
    """The channel that goes into a depthwise convolution is zero; what comes out is the bias."""
    depthwise = nn.Conv2d(6, 6 * multiplier, 3, padding=1, groups=6, bias=bias)
    model = ready(Body(nn.Sequential(depthwise, nn.Hardswish()), nn.Conv2d(6 * multiplier, 4, 1)))
    zero_rows(model.first, [0, 4], bias=True)
    pruned = prove(model)
    if multiplier == 1:
        assert pruned.first.out_channels == 4
        assert pruned.middle[0].groups == pruned.middle[0].in_channels == 4


def test_dead_channels_travel_backwards() -> None:
    """What only a dead channel reads is dead, through several layers."""
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1)))
    with torch.no_grad():
        model[4].weight[:, :2] = 0  # channels 0 and 1 of layer 2 are not read
        model[2].weight[2:, 3] = 0  # and nobody else reads channel 3 of layer 0
    pruned = prove(model)
    assert layer(pruned, 2).out_channels == 3 and layer(pruned, 0).out_channels == 3


def test_dead_channels_travel_forwards_and_back() -> None:
    """A constant makes its reader's row constant in turn; the inputs of a constant row are dead."""
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 5, 1), nn.Tanh(), nn.Conv2d(5, 2, 1)))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].weight[:3, 2:] = 0  # rows 0..2 of layer 2 see constants only
    pruned = prove(model)
    assert layer(pruned, 0).out_channels == 2 and layer(pruned, 2).out_channels == 2


def test_negative_zero_is_zero_and_tiny_is_not() -> None:
    """-0.0 is a zero weight, 1e-200 is a weight."""
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)))
    with torch.no_grad():
        model[2].weight[:, 0] = -0.0
        model[2].weight[:, 1] = 1e-200
    assert layer(prove(model), 2).in_channels == 3


def test_whole_branch_disappears() -> None:
    """A residual branch that is zero is not computed; one that is a constant is added as such."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
            self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.relu(x[:, :, 1:-1, 1:-1] + self.branch(x)))

    model = ready(Block())
    zero_rows(model.branch[2], list(range(6)), bias=True)
    model.branch[3].weight.data.zero_()
    pruned = prove(model)
    assert parameter_count(pruned.stem) == parameter_count(model.stem)
    convolutions = [name for name, module in pruned.named_modules() if isinstance(module, nn.Conv2d)]
    assert "branch.0" not in convolutions, "the constant branch is still computed"
    model.branch[3].bias.data.zero_()
    pruned = prove(model)
    convolutions = [name for name, module in pruned.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(convolutions) == ["head", "stem"]


def test_masks_that_disagree_at_an_add() -> None:
    """Output masks of the two sides of an add differ: exact all the same."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.a(x) + self.b(x)))

    model = ready(Add())
    zero_rows(model.a, [0, 1, 2], bias=True)
    zero_rows(model.b, [2, 3, 4], bias=True)
    pruned = prove(model)
    assert pruned.head.in_channels == 7
    assert pruned.a.out_channels + pruned.b.out_channels < 16


def test_gate_that_is_zero() -> None:
    """A squeeze-excite gate of constant zero kills its channel; one of constant value scales it."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
            self.fc1, self.fc2 = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(x * F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))))

    model = ready(Gate())
    zero_rows(model.fc2, [0, 1, 2])
    model.fc2.bias.data[:3] = torch.tensor([-4.0, 4.0, 0.3], dtype=torch.float64)
    prove(model)
    zero_columns(model.fc1, [0, 3])
    prove(model)


def test_model_outputs_keep_all_channels_in_order() -> None:
    """A zero or constant output channel is still an output."""
    model = ready(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.Sigmoid()))
    zero_rows(model[2], [0, 3])
    zero_columns(model[2], [1])
    assert prove(model)(image()).shape[1] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Weights, folded constants and outputs keep the model's dtype."""
    model = ready(Body(Map("swish"), nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))).to(dtype)
    zero_rows(model.first, [1, 4])
    pruned = upscale.export(model, (image().to(dtype),))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    check_equal(model, pruned, image().to(dtype), tol=tolerance)

"""torchvision for tests and benchmarks, which may lack its compiled operators, and the networks that are tested on."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import nn

from upscale.zoo.lenient import import_torchvision

torchvision = import_torchvision()

#: The networks every stage of the pipeline is tested on.
NETWORKS = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg11_bn",
    "alexnet",
    "googlenet",
    "inception_v3",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet0_5",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
    "deeplabv3_resnet50",
    "r3d_18",
)

_MIN_SIZE = {"inception_v3": 75, "alexnet": 63, "vit_b_16": 224, "deeplabv3_resnet50": 33}


def input_shape(name: str, batch: int = 2, size: int | None = None) -> tuple[int, ...]:
    """A small input shape that network ``name`` accepts; ``size`` is the wanted height and width."""
    size = max(size or 64, _MIN_SIZE.get(name, 32))
    if name == "vit_b_16":
        size = 224
    if name == "r3d_18":
        return (batch, 3, 4, size, size)
    return (batch, 3, size, size)


def build(name: str, seed: int = 0, **options: object) -> nn.Module:
    """Network ``name`` in eval mode with random weights: nothing is downloaded, the same seed gives the same model.

    Weights are drawn so that activations keep a moderate scale through any depth; batch-norm statistics and affine
    parameters are random too, so that no batch norm is an identity. ``options`` go to torchvision's builder.
    """
    options = {"weights": None, **options}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith("deeplabv3"):
        options["weights_backbone"] = None
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        for function in ("trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_"):
            # Slow, and useless: every weight is set below.
            stack.enter_context(mock.patch.object(nn.init, function, lambda tensor, *args, **kwargs: tensor))
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, **options)
        _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.uniform_(-1, 1, generator=generator).mul_((3.0 / fan_in) ** 0.5)
        elif name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.uniform_(-0.2, 0.2, generator=generator)
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)

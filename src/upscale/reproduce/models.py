"""The networks of the accuracy table by name, and any other of torchvision, timm or one's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..zoo.lenient import import_torchvision
from ..zoo.nearest import did_you_mean
from ..zoo.suite_file import find_builder
from .images import CIFAR_FILE, IMAGENET_FILE, View
from .networks import DenseNet40, ResNetCifar

__all__ = ["KNOWN", "ModelError", "Recipe", "find_recipe", "find_weights", "load_model", "load_weights", "shared"]

_HALF = (0.5, 0.5, 0.5)
_DENSENET = View((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255), 32)


class ModelError(Exception):
    """A name that is no model, or weights that are not there or do not fit it."""


@dataclass(frozen=True)
class Recipe:
    """A network: how to build it, its weights' file (without the ending), its data's file, and how it sees images.

    ``note``: what to know when its numbers are read.
    """

    title: str
    build: Callable[[], nn.Module] = field(repr=False)
    weights: str = ""
    data: str = ""
    view: View = View()
    note: str = ""


def _torchvision(name: str) -> nn.Module:
    return import_torchvision().models.get_model(name, weights=None)


def _timm(name: str) -> nn.Module:
    import_torchvision()  # timm imports it
    import timm

    return timm.create_model(name, pretrained=False)


def _timm_names() -> list[str]:
    import_torchvision()
    import timm

    return list(timm.list_models())


#: Packages of models: their names, and from a name to the model.
_PACKAGES: dict[str, tuple[Callable[[], list[str]], Callable[[str], nn.Module]]] = {
    "torchvision": (lambda: list(import_torchvision().models.list_models()), _torchvision),
    "timm": (_timm_names, _timm),
}


def _mobilenet_v1(width: float) -> nn.Module:
    import_torchvision()
    from timm.models.efficientnet import _gen_mobilenet_v1

    return _gen_mobilenet_v1("mobilenetv1_100", width)


def _edgetpu() -> nn.Module:
    import_torchvision()
    from timm.models.efficientnet import _gen_mobilenet_edgetpu

    model = _gen_mobilenet_edgetpu("mobilenet_edgetpu_100", 0.75)
    model.blocks[0][0].bn1.act = nn.Identity()  # the network that the weights are of has no activation there
    return model


def _inception(size: int) -> View:
    """The input of the networks that come from TensorFlow: their padding is the mirror image of torch's."""
    return View(_HALF, _HALF, size, rotated=True)


KNOWN: dict[str, Recipe] = {
    "resnet20": Recipe("ResNet-20", lambda: ResNetCifar(3), "resnet20_cifar10_jpeg", CIFAR_FILE, View(size=32)),
    "resnet56": Recipe("ResNet-56", lambda: ResNetCifar(9), "resnet56_cifar10_jpeg", CIFAR_FILE, View(size=32)),
    "densenet40": Recipe("DenseNet-40-12-BC", DenseNet40, "densenet40_12_bc_cifar10", CIFAR_FILE, _DENSENET),
    "mobilenet_v2": Recipe("MobileNetV2", lambda: _torchvision("mobilenet_v2"), "mobilenet_v2_imagenet", IMAGENET_FILE),
    "mobilenetv1_100": Recipe(
        "MobileNetV1-1.0", lambda: _timm("mobilenetv1_100"), "mobilenetv1_100_imagenet", IMAGENET_FILE, _inception(224)
    ),
    "mobilenetv1_050": Recipe(
        "MobileNetV1-0.5", lambda: _mobilenet_v1(0.5), "mobilenetv1_050_imagenet", IMAGENET_FILE, _inception(160)
    ),
    "mobilenet_edgetpu": Recipe(
        "MobileNet-EdgeTPU-0.75", _edgetpu, "mobilenet_edgetpu_075_imagenet", IMAGENET_FILE, _inception(224)
    ),
    "mobilenetv1_025": Recipe(
        "MobileNetV1-0.25", lambda: _mobilenet_v1(0.25), "mobilenetv1_025_imagenet", IMAGENET_FILE, _inception(128)
    ),
    "squeezenet1_0": Recipe(
        "SqueezeNet 1.0",
        lambda: _torchvision("squeezenet1_0"),
        "squeezenet1_0_imagenet",
        IMAGENET_FILE,
        note="two thirds of its weights are zero one by one (Deep Compression), which scores by magnitude see",
    ),
}


def shared() -> Path:
    """The folder with ``weights`` and ``data`` that is used where none is given, whether or not it is there."""
    return Path(os.environ.get("UPSCALE_SHARED") or Path("..") / "shared")


def find_recipe(name: str, view: View | None = None) -> Recipe:
    """A network of the table, one of torchvision or timm by its name there, or ``package.module:function``.

    ``view``: how a network that is not of the table sees images.

    Raises:
        ModelError: there is none; the message has near matches.
    """
    if name in KNOWN:
        return KNOWN[name]
    view = view or View()
    if ":" in name:
        return Recipe(name, lambda: _built(name), view=view)
    found: list[str] = list(KNOWN)
    for package, (listed, build) in _PACKAGES.items():
        if find_spec(package):
            names = listed()
            if name in names:
                return Recipe(name, functools.partial(build, name), view=view)
            found += names
    hint = did_you_mean(name, found) or "write package.module:function for a model of your own"
    raise ModelError(f"no model {name!r}: {hint}")


def _built(name: str) -> nn.Module:
    try:
        model = find_builder(name, Path.cwd())()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def find_weights(name: str, recipe: Recipe, given: Path) -> Path:
    """The weights' file: ``given`` itself, or in that folder the file of the recipe or one that is called ``name``.

    Raises:
        ModelError: there is none.
    """
    if given.is_file():
        return given
    stems = [recipe.weights] if recipe.weights else [name, name.rpartition(":")[2]]
    for stem in stems:
        for ending in (".safetensors", ".pt", ".pth"):
            if (file := given / f"{stem}{ending}").is_file():
                return file
    raise ModelError(
        f"no weights for {name}: {given / (stems[0] + '.safetensors')} is not there; give their file or folder with "
        "--weights"
    )


def load_model(name: str, recipe: Recipe, file: Path) -> nn.Module:
    """The network with the weights of ``file``, in eval mode. Raises ``ModelError`` as :func:`load_weights` does."""
    model = recipe.build()
    load_weights(name, model, file)
    return model.eval()


def load_weights(name: str, model: nn.Module, file: Path) -> None:
    """Fill a network called ``name`` with the tensors of a file: safetensors, or one of ``torch.save`` that holds a
    ``state_dict``, which is read without unpickling code.

    Raises:
        ModelError: the file cannot be read, or its tensors do not fit the network.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
    except Exception as error:  # every reader raises something else for a bad file
        raise ModelError(f"{name}: cannot read {file}: {error}") from error
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: the weights in {file} do not fit: {str(error).splitlines()[-1].strip()}") from error

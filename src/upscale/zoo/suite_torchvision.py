"""torchvision: all classifiers, segmentation, video and optical flow models, and the backbones of the detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .lenient import import_torchvision
from .subject import Subject

_SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 128, "vit_l_32": 128, "s3d": 224}
_SIZES |= {"mvit_v1_b": 224, "mvit_v2_s": 224}  # positions for no other size
_BACKBONE = ".backbone"


class Suite:
    """All of torchvision's models but the quantised ones; a detector ends in ``.backbone``: only that is tried."""

    name = "torchvision"

    def __init__(self) -> None:
        import_torchvision()
        import torchvision.models as models

        self._models = models
        self._kinds: dict[str, str] = {}
        for kind, module in (
            ("image", models),
            ("image", models.segmentation),
            ("video", models.video),
            ("flow", models.optical_flow),
            ("detector", models.detection),
        ):
            ending = _BACKBONE if kind == "detector" else ""
            self._kinds.update({name + ending: kind for name in models.list_models(module=module)})

    def names(self) -> Sequence[str]:
        return list(self._kinds)

    def others(self) -> Sequence[str]:
        return []

    def build(self, name: str, seed: int) -> Subject:
        kind = self._kinds[name]
        plain = name.removesuffix(_BACKBONE)
        torch.manual_seed(seed)
        model = self._models.get_model(plain, **_options(plain, kind))
        generator = torch.Generator().manual_seed(seed)
        images = tuple(torch.randn(shape, generator=generator) for shape in _shapes(plain, kind))
        return Subject(model.backbone if kind == "detector" else model, images)


def _options(name: str, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if kind == "detector" or name.startswith(("deeplabv3", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name.startswith("vit"):
        options["image_size"] = _size(name)
    return options


def _size(name: str) -> int:
    return _SIZES.get(name, 112 if name.startswith("vit") else 64)


def _shapes(name: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of the inputs, two examples each: small images, where the architecture allows it."""
    size = _size(name)
    if kind == "video":
        frames = 16 if name.startswith(("mvit", "s3d")) else 4
        return [(2, 3, frames, size, size)]
    if kind == "flow":
        return [(2, 3, 128, 128)] * 2
    if kind == "detector":
        size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 128)
    return [(2, 3, size, size)]

"""timm: the smallest model of every module of the library, at the smallest image that it accepts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch

from .lenient import import_torchvision
from .subject import Subject

with contextlib.suppress(ImportError):
    import_torchvision()  # timm imports it


class Suite:
    """The table ``timm_models.json``; any other model of timm can be named as well."""

    name = "timm"

    def __init__(self) -> None:
        text = resources.files("upscale.zoo").joinpath("timm_models.json").read_text(encoding="utf-8")
        data = json.loads(text)
        self.version: str = data["timm"]
        self._table: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in data["models"]}

    def names(self) -> Sequence[str]:
        return list(self._table)

    def others(self) -> Sequence[str]:
        """Models that are not in the table, but can be named."""
        import timm

        return [name for name in timm.list_models() if name not in self._table]

    def build(self, name: str, seed: int) -> Subject:
        import timm

        entry = self._table.get(name)
        if entry is None:
            config = timm.get_pretrained_cfg(name)
            channels, size, options = (config.input_size[0], config.input_size[-1], {}) if config else (3, 224, {})
        else:
            channels, size, options = entry["channels"], entry["size"], entry["kwargs"]
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, **options)
        generator = torch.Generator().manual_seed(seed)
        return Subject(model, (torch.randn(2, channels, size, size, generator=generator),))

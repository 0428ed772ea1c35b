"""transformers: small random configurations, nothing downloaded (see ``transformers_models``)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from .inputs import parse_inputs
from .lenient import import_torchvision
from .subject import Subject
from .transformers_models import MODELS

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it


class Suite:
    """The table ``MODELS``."""

    name = "transformers"

    def names(self) -> Sequence[str]:
        return list(MODELS)

    def others(self) -> Sequence[str]:
        return []

    def build(self, name: str, seed: int) -> Subject:
        import transformers

        model_class, config_class, options, inputs = MODELS[name]
        config = _config(config_class, options)
        class_name, _, part = model_class.partition(".")
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
        return Subject(getattr(model, part) if part else model, parse_inputs(inputs, seed))


def _config(name: str, options: dict[str, Any]) -> Any:
    import transformers

    nested = {key: _config(*value) for key, value in options.items() if isinstance(value, tuple)}
    return getattr(transformers, name)(**{**options, **nested})

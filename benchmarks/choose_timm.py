"""The table of timm models in ``src/upscale/zoo/timm_models.json``: the smallest model of every timm module.

``python -m benchmarks.choose_timm`` builds every registered model on torch's meta device to count its parameters,
then looks for the smallest image that the smallest one accepts. Where that is one of timm's
own test models, the smallest other one is listed too. Run once per timm release; the table is data."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from . import ROOT  # puts the tests' folder on the path, for the next one

from support import vision as _torchvision  # noqa: F401  isort: skip  (makes torchvision importable)

TABLE = ROOT / "src" / "upscale" / "zoo" / "timm_models.json"
FREE_SIZES = (64, 96, 128, 126)
FIXED_SIZES = (128, 126, 160, 192)


def parameters(name: str) -> int | None:
    """Parameters of a model, None where it cannot be built."""
    import timm

    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = timm.create_model(name, pretrained=False)
            return sum(p.numel() for p in model.parameters())
        except Exception:  # some builders compute with tensors, which the meta device refuses
            continue
    return None


def smallest(module: str) -> list[tuple[str, int]]:
    """The smallest model of a timm module with its parameters, and the smallest that is no test model."""
    import timm

    counted = [(parameters(name), name) for name in timm.list_models(module=module)]
    known = sorted((count, name) for count, name in counted if count is not None)
    real = [(count, name) for count, name in known if not name.startswith("test_")]
    return [(name, count) for count, name in dict.fromkeys([*known[:1], *real[:1]])]


def accepted(name: str) -> dict[str, Any]:
    """The smallest image size that the model accepts, with the builder's arguments that it needs."""
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, default = (config.input_size[0], config.input_size[-1]) if config else (3, 224)
    fixed = bool(config and config.fixed_input_size)
    tries = [(size, {"img_size": size}) for size in FIXED_SIZES if fixed]
    tries += [(size, {}) for size in (() if fixed else FREE_SIZES)]
    tries += [(size, {"img_size": size}) for size in (() if fixed else FREE_SIZES)]
    for size, options in [*((s, o) for s, o in tries if s < default), (default, {})]:
        try:
            model = timm.create_model(name, pretrained=False, **options).eval()
            with torch.no_grad():
                model(torch.randn(2, channels, size, size))
            return {"channels": channels, "size": size, "kwargs": options}
        except Exception:  # this size is refused, in any way
            continue
    return {"channels": channels, "size": default, "kwargs": {}}


def write(path: Path, version: str, models: list[dict[str, Any]]) -> None:
    """One model a line."""
    lines = ",\n".join(f"  {json.dumps(model)}" for model in models)
    path.write_text(f'{{\n "timm": {json.dumps(version)},\n "models": [\n{lines}\n ]\n}}\n')


def main() -> int:
    """Write the table."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models: list[dict[str, Any]] = []
    for module in timm.list_modules():
        found = smallest(module)
        if not found:
            print(f"{module}: no model can be built", file=sys.stderr, flush=True)
        for name, count in found:
            models.append({"module": module, "name": name, "parameters": count, **accepted(name)})
            print(models[-1], flush=True)
        write(options.out, timm.__version__, models)
    return 0


if __name__ == "__main__":
    sys.exit(main())

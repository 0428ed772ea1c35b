"""The table of timm models in ``src/upscale/zoo/timm_models.toml``: the smallest model of every timm module.

``python -m benchmarks.choose_timm`` builds every registered model on torch's meta device to count its parameters,
then looks for the smallest image that the smallest one accepts. Run once per timm release; the table is data."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from . import ROOT  # puts the tests' folder on the path, for the next one

from support import vision as _torchvision  # noqa: F401  isort: skip  (makes torchvision importable)

TABLE = ROOT / "src" / "upscale" / "zoo" / "timm_models.toml"
FREE_SIZES = (64, 96, 128)
FIXED_SIZES = (128, 160, 192)


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


def smallest(module: str) -> tuple[str, int] | None:
    """The smallest model of a timm module, and its parameters."""
    import timm

    counted = [(parameters(name), name) for name in timm.list_models(module=module)]
    known = sorted((count, name) for count, name in counted if count is not None)
    return (known[0][1], known[0][0]) if known else None


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


def main() -> int:
    """Write the table."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"# The smallest model of every module of timm {timm.__version__}, with the smallest image it accepts.",
        "# Written by `python -m benchmarks.choose_timm`; see there.",
        f'timm = "{timm.__version__}"',
    ]
    for module in timm.list_modules():
        found = smallest(module)
        if found is None:
            print(f"{module}: no model can be built", file=sys.stderr, flush=True)
            continue
        name, count = found
        size = accepted(name)
        kwargs = ", ".join(f"{key} = {value}" for key, value in size["kwargs"].items())
        lines += [
            "",
            "[[model]]",
            f'module = "{module}"',
            f'name = "{name}"',
            f"parameters = {count}",
            f"channels = {size['channels']}",
            f"size = {size['size']}",
            f"kwargs = {{ {kwargs} }}" if kwargs else "kwargs = {}",
        ]
        print(f"{module:28} {name:40} {count / 1e6:8.2f} M  {size['size']} {size['kwargs']}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How well ``upscale.OBS`` foretells errors: of one layer at a time a share of the inputs is masked, the network is
repaired, and what its outputs then get wrong is put beside what the scores said.

``python -m benchmarks.foretold [--nets resnet20] [--share 0.4] [--calibration 512]``

Errors are relative to the outputs' variance, on held-out examples. Scores already say that layers behind make up for a
part, a constant in ``upscale/repairing/obs.py``, which quotients of about 1 confirm."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import upscale
from upscale.importance import channel_scores
from upscale.importance.subject import Subject

from .nets import NETS, load, why_missing
from .repair import calibration, test_of


def quotients(dense: nn.Module, batches: Sequence[Tensor], share: float) -> list[tuple[str, int, float, float]]:
    """For each convolution and linear layer without groups: name, channels masked, error foretold, error found. At the
    end all of them but the last layer at once, whose errors are foretold to add up."""
    kinds = (nn.Conv2d, nn.Linear)
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1}
    scores = channel_scores(upscale.OBS(batches), Subject(dense, "input", layers, {}))
    lowest = {name: one.argsort()[: int(share * len(one))] for name, one in scores.items()}
    names = [name for name in layers if len(lowest[name])]
    found = []
    for some in track(
        [*([name] for name in names), names[:-1]], "layers", transient=True, console=Console(stderr=True)
    ):
        masked = copy.deepcopy(dense)
        for name in some:
            masked.get_submodule(name).weight.data[:, lowest[name]] = 0
        repaired = upscale.repair(masked, dense, batches, progress=False)
        told = sum(float(scores[name][lowest[name]].sum()) for name in some)
        title = some[0] if len(some) == 1 else "all but the last"
        found.append((title, sum(len(lowest[name]) for name in some), told, repaired.repair_report.outputs[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet20"])
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--calibration", type=int, default=512)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", upscale.RepairWarning)
    for name in chosen.nets:
        if missing := why_missing(name):
            raise SystemExit(missing)
        rows = quotients(load(name), calibration(name, test_of(name), chosen.calibration), chosen.share)
        table = Table(
            "layer", "masked", "foretold", "found", "quotient", title=f"{name}, {chosen.share:.0%} of one layer"
        )
        for layer, count, told, error in rows:
            table.add_row(layer, str(count), f"{told:.4f}", f"{error:.4f}", f"{error / told:.2f}")
        Console().print(table)
        print(f"mean quotient but for the last layer: {fmean(error / told for _, _, told, error in rows[:-2]):.2f}")


if __name__ == "__main__":
    main()

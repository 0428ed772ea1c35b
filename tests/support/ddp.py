"""One process of a two-process training run; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import upscale
from support.subjects import image, masked

STEPS = 3
EACH = 4  # examples a process and step


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return image(EACH, seed=10 * step + rank), torch.arange(EACH) % 5


def pruned() -> torch.fx.GraphModule:
    """Ready to train; dropout would draw differently in each process."""
    model = upscale.export(masked(), (image(),))
    model.get_submodule("dropout").p = 0.0
    return model


def run(rank: int, folder: str) -> None:
    """Train an exported model with ``DistributedDataParallel`` and leave its state in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _both_stages(rank, Path(folder))
    gc.collect()  # the wrapper must be gone before the group that it uses is
    dist.barrier()
    dist.destroy_process_group()


def _both_stages(rank: int, folder: Path) -> None:
    model = pruned()
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(rank)  # made equal by the wrapper
    model.eval()  # statistics fixed, so that one process with all examples must do the same
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
    train(wrapped, optimiser, rank)
    torch.save(model.state_dict(), folder / f"fixed-{rank}.pt")
    model.train()
    train(wrapped, optimiser, rank)
    torch.save(model.state_dict(), folder / f"trained-{rank}.pt")


def train(model: nn.Module, optimiser: torch.optim.Optimizer, rank: int) -> None:
    for step in range(STEPS):
        x, labels = batch(step, rank)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimiser.step()

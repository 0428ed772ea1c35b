"""Train a small residual network on handwritten digits, zero a share of its channels, export it, compare.

The digits (1797 images of 8x8 pixels) come with scikit-learn, so nothing is downloaded. About half a minute
on one core."""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import upscale
from upscale import measure

console = Console()


class Block(nn.Module):
    """Two convolutions and a residual connection."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitNet(nn.Module):
    """Residual blocks in two stages; the first stage's tensor has five readers, who will not agree."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*(Block(width, width) for _ in range(3)))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


@dataclass
class Digits:
    """Images (n, 1, 8, 8) and labels (n,), for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = 3 * len(order) // 4
    train, test = order[:cut], order[cut:]
    return Digits(images[train], labels[train], images[test], labels[test])


def fit(model: nn.Module, data: Digits, epochs: int, rate: float, pull: float, title: str) -> None:
    """Train with Adam on a one-cycle schedule, batches of 64; ``pull``: see :func:`shrink`."""
    steps = epochs * -(-len(data.labels) // 64)
    if not steps:
        return
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    shuffle = torch.Generator().manual_seed(0)
    model.train()
    for _ in track(range(epochs), title, console=console):
        for chosen in torch.randperm(len(data.labels), generator=shuffle).split(64):
            loss = nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            shrink(model, pull * optimiser.param_groups[0]["lr"])
            schedule.step()
    model.eval()


@torch.no_grad()
def shrink(model: nn.Module, by: float) -> None:
    """Shorten the weights of every input channel of every layer by ``by``: a group lasso's step.

    Channels that the task does not need end up small, so that zeroing them later costs little.
    """
    for layer in model.modules():
        if by and isinstance(layer, (nn.Conv2d, nn.Linear)):
            lengths = layer.weight.transpose(0, 1).flatten(1).norm(dim=1).clamp(min=1e-12)
            kept = (1 - by / lengths).clamp(min=0)
            layer.weight.mul_(kept.view(1, -1, *[1] * (layer.weight.ndim - 2)))


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Percent of the test images that are classified right."""
    return 100 * (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()


def compare(models: dict[str, nn.Module], data: Digits, runs: int) -> Table:
    """Accuracy, size, arithmetic, bytes copied and latency of each model, in a table."""
    one = data.test_images[:1]
    milliseconds = measure.latency(models, one, runs=runs, warmup=10)
    table = Table(
        title="Digits, 450 test images; latency: one thread, batch 1",
        caption="The exports compute what the masked model computes; they differ in how layers read their channels: "
        "channel by channel (baseline), by index (gather), in an order that makes most reads slices (auto).",
    )
    for heading in ("model", "accuracy %", "parameters", "MFLOPs", "copied kB", "latency ms"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, model in models.items():
        table.add_row(
            name,
            f"{accuracy(model, data):.2f}",
            f"{measure.parameters(model):,}",
            f"{measure.flops(model, one) / 1e6:.2f}",
            f"{measure.copies(model, one).bytes / 1e3:.1f}",
            f"{milliseconds[name]:.2f}",
        )
    return table


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def layout(dense: nn.Module, exported: nn.Module) -> list[int]:
    """The original index of each channel of the first stage's tensor, in the exported order.

    Read off the batch norm that writes the tensor: its weights are all different, and are only moved.
    """
    before, after = dense.bn.weight.tolist(), exported.bn.weight.tolist()
    return [before.index(value) for value in after]


def draw(masked: dict[str, Tensor], dense: nn.Module, exported: torch.fx.GraphModule, path: Path) -> None:
    """Who reads which channel of the first stage's tensor, before and after; and every layer's channels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    readers = [*(f"stage1.{i}.conv1" for i in range(3)), "stage2.0.conv1", "stage2.0.shortcut"]
    reads = torch.ones(len(readers), dense.bn.num_features)
    for row, name in enumerate(readers):
        reads[row, masked[name]] = 0
    order = layout(dense, exported)
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 9), height_ratios=(1, 1, 1.6), layout="constrained")
    kinds = {row.name: row.read for row in exported.report.layers}
    matrices = (
        ("Before: every reader keeps its own channels (blue) of the first stage's tensor", readers, reads),
        (
            "After: the same reads in the exported order; in brackets how the exported layer reads its channels",
            [f"{name} ({kinds[name]})" for name in readers],
            reads[:, order],
        ),
    )
    for axis, (title, labels, matrix) in zip(axes, matrices, strict=False):
        blank = torch.full((len(readers), reads.shape[1] - matrix.shape[1]), float("nan"))
        picture = torch.cat([matrix, blank], 1).numpy()
        axis.imshow(picture, aspect="auto", cmap="Blues", vmin=-0.1, vmax=1.4, interpolation="nearest")
        axis.set_yticks(range(len(readers)), labels)
        axis.set_xlabel("place of the channel in the tensor")
        axis.set_title(title)
    before, after = convolutions(dense), convolutions(exported)
    names = list(before)
    for offset, side, colour in ((-0.2, "in_channels", "tab:blue"), (0.2, "out_channels", "tab:orange")):
        places = [index + offset for index in range(len(names))]
        axes[2].bar(places, [getattr(before[n], side) for n in names], 0.38, color=colour, alpha=0.3)
        smaller = [getattr(after[n], side) if n in after else 0 for n in names]
        axes[2].bar(places, smaller, 0.38, color=colour, label=side.replace("_", " "))
    axes[2].set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes[2].set_title("Channels of each convolution: before (pale) and after")
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(epochs: int, tune: int, amount: float, out: Path, runs: int = 200) -> dict[str, nn.Module]:
    """The whole job; returns the models by name. ``tune``: epochs of training after the export."""
    torch.manual_seed(0)
    data = load_digits()
    dense = DigitNet()
    fit(dense, data, epochs, 4e-3, 3.0, "training")

    masked = copy.deepcopy(dense)
    manager = upscale.MaskingManager(masked, example_inputs=data.images[:2]).importance().mask(amount)
    example = (data.images[:2],)
    models: dict[str, nn.Module] = {"dense": dense, "masked": masked}
    for reads in ("baseline", "gather", "auto"):
        models[f"export {reads}"] = upscale.export(masked, example, reads=reads)
    console.print(compare(models, data, runs))

    exported = models["export auto"]
    draw(manager.masked, dense, exported, out / "channels.png")
    console.print(f"Picture: {out / 'channels.png'}")
    if tune:
        tuned = copy.deepcopy(exported)
        fit(tuned, data, tune, 1e-3, 0.0, "fine-tuning the exported model")
        console.print(
            f"The exported model is an ordinary one: {accuracy(exported, data):.2f} % becomes "
            f"{accuracy(tuned, data):.2f} % after {tune} epochs of training."
        )
        models["fine-tuned"] = tuned
    return models


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default 10)")
    parser.add_argument("--tune", type=int, default=3, help="epochs of training after the export (default 3)")
    parser.add_argument("--amount", type=float, default=0.25, help="share of input channels to zero (default 0.25)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where the picture goes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console.print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    run(chosen.epochs, chosen.tune, chosen.amount, chosen.out)


if __name__ == "__main__":
    main()

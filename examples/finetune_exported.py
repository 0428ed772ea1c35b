"""Export, then fine-tune the smaller model like any other.

What ``export`` returns is made of ordinary layers: make a new optimiser, call ``train()``, and go on. Every step is
cheaper than one of the dense model. The statistics of the batch norms are taken anew first, which costs one pass and
gives part of the accuracy back without training."""

from __future__ import annotations

import torch

import upscale
from examples.digits import accuracy, calibration, load_digits, train, trained


def main(epochs: int = 3) -> dict[str, float]:
    """Returns the figures it prints: accuracies in percent, and the loss of the first and last epoch."""
    data = load_digits()
    model = trained(data)
    figures = {"dense": accuracy(model, data)}

    pruned = upscale.prune(model, data.images[:2], amount=0.5)
    figures["pruned"] = accuracy(pruned, data)
    upscale.recalibrate(pruned, calibration(data))
    figures["recalibrated"] = accuracy(pruned, data)

    losses = train(pruned, data, epochs, rate=2e-3)
    figures |= {"first loss": losses[0], "last loss": losses[-1], "fine-tuned": accuracy(pruned, data)}
    figures["parameters kept"] = 100 * pruned.report.parameters[1] / pruned.report.parameters[0]
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, value in main().items():
        print(f"{title:>16} {value:8.3f}")

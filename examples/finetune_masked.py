"""Fine-tune with the masks on, then export.

The masks are parametrisations: whatever the optimiser does, a masked channel stays zero, so that the network that is
exported has exactly the structure that was chosen. Take this way where the training code is the model's own, or where
masks are still to change. A masked step costs what a dense one costs."""

from __future__ import annotations

import torch

import upscale
from examples.digits import accuracy, load_digits, train, trained


def main(epochs: int = 3) -> dict[str, float]:
    """Returns the figures it prints: accuracies in percent, and the loss of the first and last epoch."""
    data = load_digits()
    model = trained(data)
    figures = {"dense": accuracy(model, data)}

    manager = upscale.MaskingManager(model, example_inputs=data.images[:2])
    manager.importance("l2").mask(0.5, permanent=False)
    figures["masked"] = accuracy(model, data)

    losses = train(model, data, epochs, rate=2e-3)
    figures |= {"first loss": losses[0], "last loss": losses[-1], "fine-tuned": accuracy(model, data)}
    for name, channels in manager.masked.items():
        assert not model.get_submodule(name).weight[:, channels].any(), "a masked channel came back"

    pruned = upscale.export(model, (data.images[:2],))  # verified against the masked model
    figures["exported"] = accuracy(pruned, data)
    figures["parameters kept"] = 100 * pruned.report.parameters[1] / pruned.report.parameters[0]
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, value in main().items():
        print(f"{title:>16} {value:8.3f}")

"""INT8 after pruning: export, fine-tune, write ONNX, quantise with ONNX Runtime's static quantisation.

Weights are quantised for each output channel, activations for each tensor, with ranges from a few batches. Prune first:
the ranges are then those of the network that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

import upscale
from examples.digits import Digits, accuracy, calibration, load_digits, train, trained

__all__ = ["main", "quantise"]


class Batches(CalibrationDataReader):
    """What the quantiser runs the model on, batch by batch; for a model with one input."""

    def __init__(self, path: Path, batches: Iterable[torch.Tensor]) -> None:
        self._name = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.numpy()}


def quantise(source: Path, target: Path, batches: Iterable[torch.Tensor]) -> None:
    """Write the ONNX file ``source`` with 8-bit weights and activations to ``target``; ``batches``: for the ranges."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, target, Batches(source, batches), per_channel=True)


def accuracy_of(path: Path, data: Digits) -> float:
    """Percent of the test images that an ONNX file classifies right."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: data.test_images.numpy()})
    return 100 * float((logits.argmax(1) == data.test_labels.numpy()).mean())


def main(epochs: int = 3) -> dict[str, float]:
    """Returns the figures it prints: accuracies in percent, sizes of the files in kB."""
    data = load_digits()
    pruned = upscale.prune(trained(data), data.images[:2], amount=0.4)
    train(pruned, data, epochs, rate=2e-3)
    figures = {"pruned": accuracy(pruned, data)}
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "pruned.onnx", Path(folder) / "int8.onnx"
        upscale.to_onnx(pruned, plain)
        quantise(plain, small, calibration(data))
        for title, path in (("ONNX", plain), ("INT8", small)):
            figures |= {title: accuracy_of(path, data), f"{title} kB": path.stat().st_size / 1e3}
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, value in main().items():
        print(f"{title:>16} {value:8.3f}")

"""The demo's whole job at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from demo import demo
from upscale import measure


def test_the_demo_runs_and_its_models_agree(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    models = demo.run(epochs=2, tune=1, amount=0.25, out=tmp_path, runs=3)
    images = demo.load_digits().test_images
    with torch.no_grad():
        expected = models["masked"](images)
        for reads in ("baseline", "gather", "auto"):
            assert torch.allclose(models[f"export {reads}"](images), expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(models["dense"](images), expected, rtol=1e-3, atol=1e-3)
        assert not torch.equal(models["fine-tuned"](images), expected)
    assert measure.parameters(models["export auto"]) < measure.parameters(models["dense"])
    picture = (tmp_path / "channels.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert torch.get_num_threads() == threads


def test_training_learns_and_pulls_channels_down() -> None:
    torch.manual_seed(0)
    data, model = demo.load_digits(), demo.DigitNet(width=8)
    before = demo.accuracy(model.eval(), data)
    length = model.fc.weight.norm().item()
    demo.shrink(model, 0.1)
    assert model.fc.weight.norm().item() < length
    demo.fit(model, data, 3, 4e-3, 0.5, "test")
    assert demo.accuracy(model, data) > max(60, before + 20) and not model.training

"""The parts of ``upscale reproduce`` that need no network: images, gains, and the document."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("psutil")
pytest.importorskip("PIL")

from PIL import Image

from upscale.cli.errors import UsageError
from upscale.cli.values import listed, shares
from upscale.reproduce.gains import curves, gain, gains, mean_gain
from upscale.reproduce.images import DataError, View, load_dataset
from upscale.reproduce.rows import Combination, Row, Source, blank, merged, read_rows, write_rows
from upscale.reproduce.summary import document

# -- images -----------------------------------------------------------------------------------------------------------

SEEN = View((0.5, 0.25, 0.0), (0.5, 0.5, 1.0), 8)


def arrays(path: Path, **changes: Any) -> Path:
    """A file of twelve images; image i has the red value 20 * i everywhere, and label i % 3."""
    images = np.zeros((12, 8, 8, 3), np.uint8)
    images[..., 0] = 20 * np.arange(12)[:, None, None]
    np.savez(path, **{"images": images, "labels": np.arange(12) % 3, **changes})
    return path


def reds(images: Any) -> list[int]:
    return [round(float(pixel) * 255 / 20 * 0.5 + 255 / 40) for pixel in images.batch(range(len(images)))[:, 0, 0, 0]]


def test_pixels_are_normalised_by_channel(tmp_path: Path) -> None:
    batch = load_dataset(arrays(tmp_path / "a.npz"), "", SEEN).test.batch([3])
    assert batch.shape == (1, 3, 8, 8) and batch.is_contiguous() and batch.dtype == torch.float32
    expected = torch.tensor([(60 / 255 - 0.5) / 0.5, -0.25 / 0.5, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(batch, expected.expand(1, 3, 8, 8), atol=1e-6)


def test_images_are_turned_and_resized_as_the_network_wants_them(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[:, :2, :, 0] = 255  # a bar on top
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(2, np.int64))
    plain, turned, small = (
        load_dataset(tmp_path / "a.npz", "", View((0, 0, 0), (1, 1, 1), size, rotated)).test.batch([0])[0, 0]
        for size, rotated in ((8, False), (8, True), (4, False))
    )
    assert torch.equal(plain[:2], torch.ones(2, 8)) and not plain[2:].any()
    assert torch.equal(turned, plain.flip(0))
    assert small.shape == (4, 4) and small[0].min() > 0.8 and small[2:].max() < 0.05
    assert small.mean().item() == pytest.approx(plain.mean().item(), abs=0.05)


def test_sets_of_their_own_for_calibration_are_used(tmp_path: Path) -> None:
    images = np.full((5, 8, 8, 3), 100, np.uint8)
    more = {"calib_images": images, "calib_labels": np.zeros(5, np.int64)}
    file = arrays(tmp_path / "a.npz", test_images=images, test_labels=np.zeros(5, np.int64), **more)
    test, calibration = load_dataset(file, "", SEEN).split(None, 3, seed=0)
    assert (len(test), len(calibration)) == (5, 3)


def test_without_one_a_sample_is_held_out_and_never_evaluated_on(tmp_path: Path) -> None:
    dataset = load_dataset(arrays(tmp_path / "a.npz"), "", SEEN)
    test, calibration = dataset.split(100, 4, seed=0)
    assert sorted(reds(test) + reds(calibration)) == list(range(12)) and len(calibration) == 4
    assert [int(label) for label in test.labels] == [red % 3 for red in reds(test)]  # labels go with their images
    again, _ = dataset.split(5, 4, seed=0)
    assert reds(again) == reds(test)[:5]  # a smaller sample is part of a larger one
    other, _ = dataset.split(100, 4, seed=1)
    assert reds(other) != reds(test)
    whole, none = dataset.split(None, 4, seed=0)
    assert sorted(reds(whole)) == list(range(12)) and len(none) == 0


def test_folders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for name, red in (("b", 200), ("a", 40)):
        (tmp_path / name).mkdir()
        picture = np.zeros((30, 20, 3), np.uint8)
        picture[10:20, :, 0] = red  # the middle, which the crop keeps
        Image.fromarray(picture).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    test = load_dataset(tmp_path, "", View((0, 0, 0), (1, 1, 1), 14)).test
    assert test.labels.tolist() == [0, 1]
    middle = test.batch([0, 1])[:, 0, 7, 7] * 255
    assert middle.tolist() == pytest.approx([40, 200], abs=1)
    assert test.batch([0]).shape == (1, 3, 14, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((12, 8, 8, 3), np.float32)}, "must be uint8 of shape"),
        ({"images": np.zeros((12, 3, 8, 8), np.uint8)}, "must be uint8 of shape"),
        ({"labels": np.zeros(11, np.int64)}, "12 images need as many whole numbers"),
        ({"labels": np.zeros(12)}, "12 images need as many whole numbers"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(arrays(tmp_path / "a.npz", **changes), "", SEEN)


def test_what_is_no_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    whole = arrays(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for path, message in (
        (tmp_path / "bad.npz", "cannot read"),
        (tmp_path / "cut.npz", "cannot read"),
        (tmp_path / "single.npz", "cannot read"),
        (tmp_path / "other.npz", "holds weights"),
        (tmp_path / "nowhere", "no folder and no .npz file"),
        (tmp_path, "has neither cifar10.npz, nor folders with images"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset(path, "cifar10.npz", SEEN)
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "pickled.npz", images=objects, labels=np.zeros(1, np.int64))
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(tmp_path / "pickled.npz", "", SEEN)


def test_jpeg_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = []
    for size in (8, 9):
        drawn = io.BytesIO()
        Image.new("RGB", (size, 8)).save(drawn, format="jpeg")
        files.append(np.frombuffer(drawn.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "a.npz", jpeg=np.concatenate(files), offsets=offsets, labels=np.zeros(2, np.int64))
    test = load_dataset(tmp_path / "a.npz", "", SEEN).test
    assert test.batch([1]).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"different sizes, \(8, 8\) and \(8, 9\)"):
        test.batch([0, 1])


# -- gains ------------------------------------------------------------------------------------------------------------

SOURCE = Source("net", "w.safetensors", "d.npz", 100)


def row(method: str, amount: float, top1: float, flops: float, latency: float = 1.0, model: str = "net") -> Row:
    how = Combination("l2", "input", method, amount) if amount else Combination()
    made = blank(SOURCE, how, "1", "2", "machine")
    made.model, made.top1, made.flops_left, made.latency_left, made.evaluated = model, top1, flops, latency, 100
    return made


def two(model: str = "net") -> list[Row]:
    return [
        row("dense", 0, 80, 1, model=model),
        row("unconstrained", 0.2, 70, 0.8, 0.9, model),
        row("unconstrained", 0.4, 30, 0.5, 0.6, model),
        row("constrained", 0.2, 60, 0.6, 0.7, model),
        row("constrained", 0.4, 10, 0.4, 0.5, model),
    ]


def test_gains_are_those_computed_by_hand() -> None:
    unconstrained, constrained = curves(two())
    found = gain(unconstrained, constrained)
    assert found.everywhere["amount"] == pytest.approx((10 + 20) / 2)
    assert found.alive["amount"] == pytest.approx(10)  # at 40 %, neither has half of 80
    assert found.worst == (10, 0.2)
    # FLOPs 0.5, 0.6, 0.8, 1: unconstrained 30, 43.33, 70, 80; constrained 35, 60, 70, 80: differences -5, -16.67, 0, 0
    area = 0.1 * (-5 - 50 / 3) / 2 + 0.2 * (-50 / 3) / 2
    assert found.everywhere["flops_left"] == pytest.approx(area / 0.5)
    assert found.alive["flops_left"] == pytest.approx(0.2 * (-50 / 3) / 2 / 0.4)  # from 0.6 on


def test_a_curve_gains_nothing_over_itself_and_less_than_nothing_over_a_better_one() -> None:
    unconstrained, constrained = curves(two())
    assert set(gain(constrained, constrained).everywhere.values()) == {0.0}
    there, back = gain(unconstrained, constrained), gain(constrained, unconstrained)
    assert all(there.everywhere[axis] == pytest.approx(-back.everywhere[axis]) for axis in there.everywhere)


def test_only_curves_with_both_methods_and_a_dense_network_are_compared() -> None:
    rows = two() + two("other")[:3] + two("third")[1:]
    found = gains(curves(rows), "unconstrained")
    assert [one.better.model for one in found] == ["net"]
    assert math.isnan(mean_gain([], "amount", alive=False))
    assert mean_gain(gains(curves(two() + two("other")), "unconstrained"), "amount", alive=False) == pytest.approx(15)


def test_failed_rows_are_left_out_of_curves() -> None:
    rows = two()
    rows[2].top1, rows[2].reason = None, "out of memory"
    assert [len(curve.points) for curve in curves(rows)] == [2, 3]


# -- the document and the table ---------------------------------------------------------------------------------------


def test_the_document_says_gains_losses_numbers_and_failures() -> None:
    rows = two()
    rows[4].reason, rows[4].top1 = "it <broke>", None
    text = document(rows, ["net.png"], "upscale reproduce --models net")
    assert "`upscale reproduce --models net`" in text and "![net](net.png)" in text
    assert "| net | +10.0 |" in text and "| **mean** | **+10.0** |" in text
    assert "Where unconstrained masks lose (1 of 1 curves)" in text
    assert "| net | l2 | unconstrained | 80.0 | 70.0 | 30.0 |" in text
    assert "| net | l2 | constrained | 80.0 | 60.0 |  |" in text
    assert "net, l2 input constrained 40 %: it &lt;broke>" in text


def test_rows_on_disk_are_the_same_and_replace_each_other(tmp_path: Path) -> None:
    rows = two()
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    newer = row("constrained", 0.2, 61, 0.6)
    assert merged(rows, newer) == [*rows[:3], newer, rows[4]]
    assert merged(rows, row("constrained", 0.3, 61, 0.6))[:5] == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".1", (0.1,)),
        (".05:.5:.05", tuple(k / 20 for k in range(1, 11))),
        (".1:.35:.1", (0.1, 0.2, 0.3)),
        ("0.3:0.3:1", (0.3,)),
    ],
)
def test_amounts_are_exact(text: str, expected: tuple[float, ...]) -> None:
    assert shares(text) == expected


@pytest.mark.parametrize("text", ["", "0", "1", ".1:.2", ".1:.2:0", ".2:.1:.1", ".1:1:.1", "a", ".1:b:.1", ".1:.5:nan"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--amounts"):
        listed("--amounts", [text], shares)


def test_without_pillow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    test = load_dataset(tmp_path, "", SEEN).test
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        test.batch([0])

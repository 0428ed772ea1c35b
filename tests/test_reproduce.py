"""``upscale reproduce``: rows that are true, a table that is always whole, and mistakes that are told."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import upscale
from support.classifiers import CLASSES, drawn_images, residual
from support.command import in_process, interrupted, wait_until
from upscale.cli.reproduce import HELP
from upscale.reproduce import executors
from upscale.reproduce.executors import local, on_ray
from upscale.reproduce.images import View, load_dataset
from upscale.reproduce.models import ModelError, find_recipe, find_weights, load_model
from upscale.reproduce.rows import Combination, Row, Source, blank, read_rows, write_rows
from upscale.reproduce.run import combinations, left, plan_jobs
from upscale.reproduce.worker import Job, Subject, evaluate
from upscale.zoo.table import BadTableError

TESTS = Path(__file__).resolve().parent
NAME = "support.classifiers:residual"
COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16)
TIMES = ("latency_ms", "latency_left", "seconds")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the weights of a small network and images that it tells apart."""
    monkeypatch.syspath_prepend(str(TESTS))
    torch.manual_seed(0)
    model = residual().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_(0, 0.1)
        model.norm.running_var.uniform_(0.5, 1.5)
    images = drawn_images(60)
    np.savez(tmp_path / "data.npz", images=images, labels=np.zeros(60, dtype=np.int64))
    seen = load_dataset(tmp_path / "data.npz", "", View(*COLOURS)).test.batch(range(60))
    with torch.no_grad():
        model.head.bias -= model(seen).mean(0)  # otherwise all images are of one class
        labels = model(seen).argmax(1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "data.npz", images=images, labels=labels.numpy())
    return tmp_path


def source(place: Path, **changes: object) -> Source:
    given = Source(NAME, str(place / "weights.safetensors"), str(place / "data.npz"), 40, 8, 0, *COLOURS)
    return replace(given, **changes)


def without_times(row: Row) -> Row:
    return replace(row, **dict.fromkeys(TIMES))


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "method"), [("input", "unconstrained"), ("output", "constrained"), ("input", "contiguous")]
)
def test_a_row_is_what_the_library_gives_by_itself(place: Path, side: str, method: str) -> None:
    """Masked, exported and evaluated once more, from a model that nothing was tried on before."""
    given = source(place)
    row = evaluate(Job(given, Combination("l2", side, method, 0.25)))
    assert row.reason == "" and row.error is not None and row.error < 1e-4
    subject = Subject(given)
    model = subject.dense
    manager = upscale.MaskingManager(model, side, method, example_inputs=subject.example).importance("l2").mask(0.25)
    pruned = upscale.export(model, (subject.example,))
    images = subject.images.batch(range(40))
    right = pruned(images).argmax(1) == subject.images.labels
    assert row.top1 == pytest.approx(100 * right.double().mean().item(), abs=1e-3)
    assert row.parameters == pruned.report.parameters[1] < pruned.report.parameters[0]
    assert row.parameters_left == pytest.approx(row.parameters / pruned.report.parameters[0], abs=1e-5)
    assert row.channels == sum(map(len, manager.masked.values())) > 0
    assert row.evaluated == 40 and row.latency_ms > 0 and row.latency_left > 0


def test_a_row_does_not_depend_on_the_ones_before_it(place: Path) -> None:
    """Scores and graph are kept between combinations; weights must not be."""
    jobs = [
        Job(source(place), how)
        for how in combinations(["l2", "hrank", "random"], ["input"], ["unconstrained", "contiguous"], [0.25, 0.5])
    ]
    forth = [without_times(evaluate(job)) for job in jobs]
    back = [without_times(evaluate(job)) for job in reversed(jobs)]
    assert forth == back[::-1] and not any(row.reason for row in forth)
    assert len({row.top1 for row in forth}) > 2  # otherwise nothing is told apart


def test_a_share_that_is_no_channel_is_the_dense_network(place: Path) -> None:
    dense, row = (
        evaluate(Job(source(place), how))
        for how in (Combination(), Combination("l1", amount=0.01, method="constrained"))
    )
    assert (row.channels, row.top1, row.parameters_left, row.reason) == (0, dense.top1, 1.0, "")


def test_an_export_that_differs_is_a_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upscale.reproduce import worker

    def wrong(compiled: object, name: str) -> nn.Module:
        model = finish(compiled, name)  # type: ignore[arg-type]
        with torch.no_grad():
            model.head.bias += 1
        return model

    finish = worker.finish
    monkeypatch.setattr(worker, "finish", wrong)
    row = evaluate(Job(source(place), Combination("l2", "input", "unconstrained", 0.25)))
    assert "differs from the masked one" in row.reason and row.top1 is None


def test_scores_from_data_see_no_image_that_is_evaluated(place: Path) -> None:
    subject = Subject(source(place, images=1000))
    assert (len(subject.images), len(subject.calibration)) == (52, 8)
    row = evaluate(Job(source(place, images=0), Combination("hrank", "input", "unconstrained", 0.25)))
    assert "not evaluated on" in row.reason and row.top1 is None
    assert evaluate(Job(source(place, images=0), Combination("l2", "input", "unconstrained", 0.25))).evaluated == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "support.classifiers:features"}, "do not fit"),
        ({"weights": "nowhere.safetensors"}, "cannot read"),
        ({"data": "nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_what_cannot_be_tried_is_a_row_with_the_reason(place: Path, changes: dict[str, str], message: str) -> None:
    row = evaluate(Job(source(place, **changes), Combination()))
    assert message in row.reason and row.top1 is None


def test_more_classes_than_outputs_are_refused(place: Path) -> None:
    arrays = dict(np.load(place / "data.npz"))
    np.savez(place / "data.npz", images=arrays["images"], labels=arrays["labels"] % CLASSES + 1)
    assert f"5 classes, Residual only {CLASSES}" in evaluate(Job(source(place), Combination())).reason


# -- the run ----------------------------------------------------------------------------------------------------------


def test_rows_of_another_size_or_calibration_are_no_rows_of_this_one(place: Path) -> None:
    usual = source(place, calibration=256)
    others = [replace(usual, **change) for change in ({"size": 32}, {"std": (1.0, 1.0, 1.0)}, {"calibration": 8})]
    out = place / "rows.csv"
    write_rows(out, [blank(usual, Combination(), upscale.__version__, "", "")])
    jobs = plan_jobs([usual, *others], [Combination()])
    assert left(jobs, out, resume=True) == jobs[1:]


def test_combinations_have_the_dense_network_once_and_no_contiguous_outputs() -> None:
    found = combinations(["l1"], ["input", "output"], ["unconstrained", "contiguous"], [0.5, 0.1])
    assert [str(how) for how in found] == [
        "dense",
        "l1 input unconstrained 10 %",
        "l1 input unconstrained 50 %",
        "l1 input contiguous 10 %",
        "l1 input contiguous 50 %",
        "l1 output unconstrained 10 %",
        "l1 output unconstrained 50 %",
    ]


def test_processes_give_the_rows_of_this_one_and_survive_a_death(place: Path) -> None:
    wanted = combinations(["l2"], ["input"], ["unconstrained"], [0.25])
    jobs = plan_jobs([source(place, model="support.classifiers:dying"), source(place)], wanted)
    found = dict(local(jobs, 2))
    assert set(found) == set(jobs)
    assert [found[job].reason for job in jobs[:2]] == ["its process died: out of memory?"] * 2
    assert [without_times(found[job]) for job in jobs[2:]] == [without_times(evaluate(job)) for job in jobs[2:]]


class Processes:
    """A pool without processes, in which a job of the network "killer" breaks everything; others take a moment."""

    def __init__(self, refuses: int = -1) -> None:
        self.running: list[Future[Row]] = []
        self.refuses, self.submitted = refuses, 0

    def submit(self, work: Callable[[Job], Row], job: Job) -> Future[Row]:
        self.submitted += 1
        if self.submitted == self.refuses:
            raise BrokenProcessPool
        future: Future[Row] = Future()
        self.running.append(future)
        if job.source.model != "killer":
            how = job.combination
            Timer(0.2, lambda: future.done() or future.set_result(blank(job.source, how, "", "", ""))).start()
            return future
        for other in self.running:
            if not other.done():
                other.set_exception(BrokenProcessPool())
        return future


def test_only_the_job_that_kills_its_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_pool", lambda workers: contextlib.nullcontext(Processes()))
    jobs = [Job(Source(name, "", ""), Combination()) for name in ("a", "b", "killer", "c")]
    found = dict(local(jobs, 3))
    assert {job.source.model for job in jobs if found[job].reason} == {"killer"}


def test_no_job_is_lost_where_a_process_dies_before_the_next_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = iter([Processes(refuses=2), Processes()])
    monkeypatch.setattr(executors, "_pool", lambda workers: contextlib.nullcontext(next(pools)))
    jobs = [Job(Source(name, "", ""), Combination()) for name in ("a", "b", "c")]
    assert set(dict(local(jobs, 2))) == set(jobs)


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_of_two_gives_the_same_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan_jobs([source(place)], combinations(["l2"], ["input"], ["unconstrained"], [0.25]))
    found = dict(on_ray(jobs, 2))
    assert [without_times(found[job]) for job in jobs] == [without_times(evaluate(job)) for job in jobs]


def test_run_resume_pictures_and_summary(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    common = ("reproduce", "--models", NAME, "--weights", place / "weights.safetensors", "--data", place / "data.npz")
    common += ("--size", 16, "--images", 40, "--calibration", 8, "--importance", "l2", "--workers", 1, "--out", out)
    assert in_process(*common, "--amounts", ".25", "--methods", "unconstrained,constrained") == 0
    shown = capsys.readouterr()
    assert "top-1 in percent" in shown.out and "equal FLOPs" in shown.out
    rows = read_rows(out / "rows.csv")
    assert [str(row.combination) for row in rows] == [
        "dense",
        "l2 input unconstrained 25 %",
        "l2 input constrained 25 %",
    ]
    names = sorted(path.name for path in out.iterdir())
    assert names == ["rows.csv", "summary.md", "support.classifiers_residual-input-40-8_to_calibrate.png"]
    text = (out / "summary.md").read_text()
    assert (
        "What unconstrained masks gain" in text and "support.classifiers_residual-input-40-8_to_calibrate.png" in text
    )
    assert (out / names[2]).read_bytes().startswith(b"\x89PNG")

    assert in_process(*common, "--amounts", ".25:.5:.25", "--methods", "unconstrained") == 0
    assert "2 of 3 combinations are in" in capsys.readouterr().err.replace("\n", " ")
    again = read_rows(out / "rows.csv")
    assert again[:3] == rows and str(again[3].combination) == "l2 input unconstrained 50 %"


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_whole_table_and_no_process(place: Path) -> None:
    out = place / "out"
    models = f"{NAME},support.classifiers:sleeping"
    arguments = ["--models", models, "--size", "16", "--importance", "l2", "--amounts", ".25", "--workers", "2"]
    files = ["--weights", str(place / "weights.safetensors"), "--data", str(place / "data.npz"), "--out", str(out)]
    call = ["reproduce", *arguments, *files, "--methods", "unconstrained"]
    group, status, output = interrupted(call, place, lambda: _rows(out, 2))
    assert status == 130 and "interrupted" in output, output
    assert {row.model for row in read_rows(out / "rows.csv")} == {NAME}
    assert sorted(path.name for path in out.iterdir()) == ["rows.csv"]
    wait_until(lambda: not _alive(group), 30)
    assert not _alive(group)


def _alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _rows(out: Path, count: int) -> bool:
    return (out / "rows.csv").exists() and len(read_rows(out / "rows.csv")) >= count


OWN = ("--models", NAME, "--weights", "w.safetensors", "--data", "d.npz", "--size", "8")
MISTAKES = [
    (("--models", "resnet21"), "no model 'resnet21': did you mean resnet"),
    (("--models", "a:b"), "a:b is not of the table: say --weights and --data"),
    (("--amounts", ".1:.5"), "--amounts: '.1:.5' must be a number, or first:last:step"),
    (("--amounts", "0,1"), "--amounts: 0 must be more than 0"),
    (("--importance", "l3"), "--importance: 'l3' is none of l1, l2"),
    (("--methods", "free"), "--methods: 'free' is none of unconstrained"),
    (("--ranking", "even,everywhere"), "--ranking: 'everywhere' is none of even, global"),
    (("--ranking", ","), "--ranking needs a value"),
    (("--sides", "both"), "--sides: 'both' is none of input, output"),
    (("--images", "1"), "--images: '1' must be all, or a whole number of at least 2"),
    (("--mean", "1,2"), "--mean: '1,2' must be three numbers"),
    (("--importance", "hrank", "--images", "all", *OWN), "hrank needs images that are not evaluated on"),
    (("--executor", "slurm"), "--executor: 'slurm' is none of local, ray"),
    (("--models", "resnet20", "--weights", "."), "resnet20_cifar10_jpeg.safetensors is not there"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_a_mistake_is_one_message_and_status_2(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(residual().state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "d.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4, np.int64))
    assert in_process("reproduce", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "w.safetensors"]


def test_a_table_of_another_kind_is_refused(place: Path) -> None:
    (place / "rows.csv").write_text("x,y\n1,2\n")
    with pytest.raises(BadTableError, match="not an accuracy table"):
        left(plan_jobs([source(place)], [Combination()]), place / "rows.csv", resume=True)


def test_help_shows_its_examples_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert in_process("reproduce", "--help") == 0
    shown = capsys.readouterr().out
    for example in (text.strip() for text in HELP.splitlines() if text.startswith("  upscale ")):
        assert example in shown
    for option in (
        "--models",
        "--importance",
        "--amounts",
        "--sides",
        "--methods",
        "--data",
        "--weights",
        "--executor",
    ):
        assert option in shown


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_found_by_name_and_read_without_pickle(place: Path) -> None:
    recipe = find_recipe(NAME)
    model = load_model(NAME, recipe, place / "weights.safetensors")
    torch.save({"state_dict": model.state_dict()}, place / "residual.pth")
    assert find_weights(NAME, recipe, place) == place / "residual.pth"
    again = load_model(NAME, recipe, place / "residual.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    class Payload:
        def __reduce__(self) -> object:
            return (os.mkdir, (str(place / "owned"),))

    (place / "residual.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match="cannot read"):
        load_model(NAME, recipe, place / "residual.pth")
    assert not (place / "owned").exists()


def test_weights_of_another_network_name_what_differs(place: Path) -> None:
    other = copy.deepcopy(residual().state_dict())
    other["inner.weight"] = torch.zeros(8, 16, 3, 3)
    save_file(other, place / "other.safetensors")
    with pytest.raises(ModelError, match="inner.weight"):
        load_model(NAME, find_recipe(NAME), place / "other.safetensors")

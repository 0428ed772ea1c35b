"""Who runs a model: torch, torch.compile, CUDA graphs, ONNX Runtime. Each makes a function of tensors of a module."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Setting
from .variants import UnavailableError

Prepared = Callable[..., Any]
_BEFORE_GRAPH = 3  # calls in which kernels are chosen and loaded
_COMPILERS = ("g++", "clang++", "c++", "cl")


def eager(model: nn.Module, args: tuple[Any, ...], setting: Setting) -> Prepared:
    """The module as it is."""
    return lambda *inputs: model(*inputs)


def inductor(model: nn.Module, args: tuple[Any, ...], setting: Setting) -> Prepared:
    """``torch.compile`` for exactly these shapes, compiled when this returns."""
    if setting.device == "cpu" and not has_compiler():
        raise UnavailableError("torch.compile needs a C++ compiler: install g++, or name one in the variable CXX")
    compiled = torch.compile(model, dynamic=False)
    with torch.inference_mode():
        compiled(*args)
    return lambda *inputs: compiled(*inputs)


def cudagraphs(model: nn.Module, args: tuple[Any, ...], setting: Setting) -> Prepared:
    """The kernels of one call in eager mode, recorded and launched together: the time of the GPU alone."""
    if setting.device == "cpu":
        raise UnavailableError("CUDA graphs need a GPU")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(aside):
            for _ in range(_BEFORE_GRAPH):
                model(*args)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            model(*args)
    return functools.partial(_replayed, graph, (model, args))


def _replayed(graph: torch.cuda.CUDAGraph, held: tuple[Any, ...], *inputs: Any) -> None:
    """One more call on the same inputs. ``held``: what the graph reads, which must live as long as it."""
    graph.replay()


def has_compiler() -> bool:
    """Whether there is a C++ compiler for Inductor."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)


def onnxruntime(model: nn.Module, args: tuple[Any, ...], setting: Setting) -> Prepared:
    """A session on a file that ``torch.onnx.export`` wrote, with the setting's threads."""
    if setting.memory_format != "contiguous":
        raise UnavailableError("ONNX has one memory format: see contiguous")
    if setting.device != "cpu":
        raise UnavailableError("ONNX Runtime is timed on the CPU only")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="upscale-") as folder:
        path = Path(folder) / "model.onnx"
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter tells of its steps
            torch.onnx.export(model, args, str(path), dynamo=True, verbose=False)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(args):
        raise UnavailableError(f"the ONNX model takes {len(names)} inputs, not {len(args)}")
    feed = {name: value.numpy() for name, value in zip(names, args, strict=True) if isinstance(value, Tensor)}
    return lambda *inputs: session.run(None, feed)  # the inputs are always the same: nothing is converted in the timing


BACKENDS: dict[str, Callable[[nn.Module, tuple[Any, ...], Setting], Prepared]] = {
    "eager": eager,
    "compile": inductor,
    "cudagraphs": cudagraphs,
    "onnxruntime": onnxruntime,
}

#: Packages that a backend needs, beyond torch.
NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def missing_packages(backend: str) -> list[str]:
    """Packages that the backend needs and that are not installed."""
    return [package for package in NEEDS.get(backend, ()) if find_spec(package) is None]

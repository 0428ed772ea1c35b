"""Tensors and one JSON text in a safetensors file, with a checksum over both."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upscale.errors import FileError
from upscale.files import replacing

__all__ = ["FORMAT", "VERSION", "check_kind", "digest", "parse", "read", "write"]

FORMAT, VERSION = "upscale model", 1
_KEY = "upscale"


def write(path: Path, body: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``body`` and ``tensors``, whole or not at all.

    Raises:
        FileError: the file cannot be written, or a tensor is of a type that safetensors files cannot hold.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {"format": FORMAT, "version": VERSION, "sha256": digest(body, ready), "body": body}
    try:
        with replacing(path) as draft:
            draft.touch()
            mode = stat.S_IMODE(draft.stat().st_mode)
            # one entry only: several would be written in an order that changes from call to call
            save_file(ready, draft, {_KEY: _compact(head)})
            draft.chmod(mode)  # safetensors makes files that nobody else can read, whatever the umask
    except (OSError, SafetensorError) as error:
        raise FileError(f"{str(path)!r} cannot be written: {error}") from error
    except KeyError as error:
        raise FileError(f"{str(path)!r} cannot be written: safetensors files hold no {error.args[0]}") from error


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The body and the tensors of a file.

    Raises:
        FileError: the file cannot be read, is no saved model, is damaged, or was written by a later version.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            head = _head(path, (file.metadata() or {}).get(_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise FileError(f"{str(path)!r} cannot be read as a saved model: {error}") from error
    if head["sha256"] != digest(head["body"], tensors):
        raise FileError(f"{str(path)!r} is damaged: its contents do not match its checksum")
    return head["body"], tensors


def _head(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise FileError(f"{str(path)!r} holds no saved model: write one with upscale.save")
    head = parse(path, text)
    check_kind(path, head, FORMAT, VERSION)
    if set(head) != {"format", "version", "sha256", "body"}:
        raise FileError(f"{str(path)!r} is damaged: its header is not that of a saved model")
    return head


def check_kind(path: Path, head: Any, expected: str, newest: int) -> None:
    """Refuse another kind of file, and one of a version that is not known here."""
    if not isinstance(head, dict) or head.get("format") != expected:
        raise FileError(f"{str(path)!r} holds no saved model: write one with upscale.save")
    version = head.get("version")
    if type(version) is not int or version < 1:
        raise FileError(f"{str(path)!r} is damaged: it has no version")
    if version > newest:
        raise FileError(
            f"{str(path)!r} has version {version} of the format, and this upscale reads up to {newest}: upgrade upscale"
        )


def parse(path: Path, text: str) -> Any:
    """JSON from a file, with what Python's reader raises beyond its own errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} is damaged: its description is no JSON ({error})") from error


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def digest(body: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of JSON data and of tensors, in hexadecimal."""
    total = hashlib.sha256(_compact(body).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode(errors="surrogatepass"))
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()

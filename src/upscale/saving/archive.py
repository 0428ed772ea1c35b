"""``.pt2`` files: a program of ``torch.export`` with the report and a checksum in the archive's extra files.

Reading such a file hands it to torch, which unpickles parts of it where the file says so, and evaluates symbolic sizes
as text (through sympy). The parts that could be pickled are refused here, native code as well; the sizes cannot be
checked, so a file is still to be loaded only where its writer is trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from upscale.errors import FileError
from upscale.files import replacing
from upscale.recipe.codec import Pool, decode, encode
from upscale.report import Report
from upscale.saving.store import check_kind, parse

__all__ = ["read", "write"]

_FORMAT, _VERSION = "upscale program", 1
_EXTRA = "extra/upscale.json"
_LARGEST = 1 << 26  # bytes of a description
#: What a file may not hold: pickled objects, code of a compiler. A folder and how names in it begin.
_REFUSED = ("/data/aotinductor/", "/data/constants/custom_obj", "/data/constants/opaque_obj")


def write(path: Path, program: ExportedProgram, report: Report) -> None:
    """Write ``program`` without its example inputs, which torch would pickle; whole or not at all.

    Raises:
        FileError: the file cannot be written, or torch cannot serialise the program or not read it again.
    """
    program.example_inputs = None
    try:
        with replacing(path) as draft, draft.open("w+b") as file:
            with _quiet():
                torch.export.save(program, file)
            _read_again(path, file)
            _describe(file, report)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be written: {error}") from error
    except Exception as error:
        raise FileError(f"torch cannot write {str(path)!r}: {type(error).__name__}: {error}") from error


def _read_again(path: Path, file: Any) -> None:
    """Torch writes some programs that it does not read, those that return texts for instance."""
    file.seek(0)
    try:
        with _quiet():
            torch.export.load(file)
    except Exception as error:
        raise FileError(
            f"{str(path)!r} cannot be written: torch does not read what it makes of this model (does it return a "
            f"text?); save it as .safetensors. {type(error).__name__}: {error}"
        ) from error


def _describe(file: Any, report: Report) -> None:
    """Add the report, and a checksum over all that torch has written."""
    pool = Pool()
    data = {"report": encode(report, pool), "lists": pool.texts}
    with zipfile.ZipFile(file, "a") as archive:
        root = _root(archive)
        head = {"format": _FORMAT, "version": _VERSION, "sha256": _digest(archive, data), "body": data}
        archive.writestr(f"{root}/{_EXTRA}", json.dumps(head, separators=(",", ":")))


def read(path: Path) -> nn.Module:
    """The program of a file as a module.

    Raises:
        FileError: the file cannot be read, was not written by :func:`write`, is damaged or newer, or holds pickled
            objects or native code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            body = _checked(path, archive)
        with _quiet():
            program = torch.export.load(str(path))
            module = program.module()
    except FileError:
        raise
    except Exception as error:  # torch checks little of what it reads
        raise FileError(f"{str(path)!r} cannot be read as a saved program: {type(error).__name__}: {error}") from error
    module.report = decode(Report, body["report"], Pool(body["lists"]), "report")
    return module


def _checked(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    """The description of an archive that is what :func:`write` wrote."""
    names = archive.namelist()
    name = f"{_root(archive)}/{_EXTRA}"
    if name not in names or archive.getinfo(name).file_size > _LARGEST:
        raise FileError(f"{str(path)!r} was not written by upscale.save: load it with torch.export.load")
    head = parse(path, archive.read(name).decode(errors="replace"))
    check_kind(path, head, _FORMAT, _VERSION)
    body = head.get("body")
    if not isinstance(body, dict) or set(body) != {"report", "lists"}:
        raise FileError(f"{str(path)!r} is damaged: its description lacks a part")
    if len(set(names)) != len(names) or head.get("sha256") != _digest(archive, body):
        raise FileError(f"{str(path)!r} is damaged: its contents do not match its checksum")
    _refuse_pickles(path, archive)
    return body


def _refuse_pickles(path: Path, archive: zipfile.ZipFile) -> None:
    for name in archive.namelist():
        legacy = name.endswith(".pt") and archive.getinfo(name).file_size and "/data/" in name
        if legacy or any(part in name for part in _REFUSED):
            raise FileError(f"{str(path)!r} holds pickled objects or native code ({name}), which upscale does not load")
        if name.endswith("_config.json") and "/data/" in name:
            config = parse(path, archive.read(name).decode(errors="replace"))
            entries = config.get("config") if isinstance(config, dict) else None
            if not isinstance(entries, dict):
                raise FileError(f"{str(path)!r} is damaged: {name} is no list of tensors")
            for entry in entries.values():
                if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                    raise FileError(f"{str(path)!r} holds a pickled tensor ({name}), which upscale does not load")


def _root(archive: zipfile.ZipFile) -> str:
    return archive.namelist()[0].split("/")[0] if archive.namelist() else ""


def _digest(archive: zipfile.ZipFile, body: Any) -> str:
    """SHA-256 of the description and of all other entries."""
    total = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode())
    for name in sorted(archive.namelist()):
        if not name.endswith(f"/{_EXTRA}"):
            total.update(f"\0{name}\0".encode(errors="surrogatepass"))
            with archive.open(name) as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's own remarks on its file format are not for the user."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

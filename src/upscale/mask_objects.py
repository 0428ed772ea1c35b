"""Masks as objects: looked at, set by hand, saved to a file and loaded from one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import InputError
from .files import replacing

__all__ = ["MaskSet", "Masks", "load_masks", "save_masks"]

_FORMAT, _VERSION = "upscale masks", 1


class Masks(Mapping[str, Tensor]):
    """The masks of a :class:`MaskingManager`: for every layer that it masks, a bool tensor of shape (channels,) of the
    manager's side, True where the channel is **kept** and False where it is zeroed, as in ``torch.nn.utils.prune``.

    Reading gives a copy. ``masks[name] = mask`` and :meth:`update` zero channels at once, after every check.
    """

    def __init__(
        self,
        side: str,
        sizes: Mapping[str, int],
        masked: Mapping[str, Tensor],
        skipped: Mapping[str, str],
        apply: Callable[[dict[str, Tensor]], None],
    ) -> None:
        self.side = side
        self._sizes, self._masked, self._skipped, self._apply = sizes, masked, skipped, apply

    def __getitem__(self, name: str) -> Tensor:
        mask = torch.ones(self._sizes[name], dtype=torch.bool)
        mask[self._masked.get(name, torch.empty(0, dtype=torch.int64))] = False
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __repr__(self) -> str:
        lines = [f"  {name}: {int(mask.sum())} of {len(mask)} kept" for name, mask in self.items()]
        return "\n".join([f"masks on the {self.side} side", *lines])

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.update({name: mask})

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of several layers; others stay as they are.

        Raises:
            InputError: a layer that is not masked here, a mask of the wrong length or type, one that keeps nothing, one
                that keeps a channel whose weights were zeroed for good, or masks of the other side. Nothing is
                changed then.
        """
        side = getattr(masks, "side", None)
        if side not in (None, self.side):
            raise InputError(f"these are masks of the {side} side; the manager's side is {self.side!r}")
        self._apply({name: torch.nonzero(~self._checked(name, mask)).flatten() for name, mask in masks.items()})

    def _checked(self, name: str, mask: Any) -> Tensor:
        if name not in self._sizes:
            reason = self._skipped.get(name, "the model has no such layer; see list(manager.masks)")
            raise InputError(f"{name!r} cannot be masked on the {self.side} side: {reason}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"the mask of {name} must be a bool tensor, True for channels that are kept, not {kind}")
        if mask.shape != (self._sizes[name],):
            raise InputError(
                f"the mask of {name} must have shape ({self._sizes[name]},), one entry for each {self.side} channel, "
                f"not {tuple(mask.shape)}"
            )
        if not bool(mask.any()):
            raise InputError(f"the mask of {name} keeps no channel; a layer cannot lose its last one")
        return mask.detach().cpu()


class MaskSet(dict[str, Tensor]):
    """Masks read from a file: layer -> bool tensor, True for kept. ``side``: of the channels, None where unknown."""

    side: str | None = None


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write masks (``manager.masks``, or any dict of bool tensors) to a safetensors file, whole or not at all.

    The side of the masks is kept where ``masks`` says it, and a checksum.

    Raises:
        InputError: a mask is not a one-dimensional bool tensor, or the file cannot be written.
    """
    tensors = {}
    for name, mask in masks.items():
        if not isinstance(name, str) or not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
            raise InputError(f"the mask of {name!r} must be a bool tensor of one dimension")
        tensors[name] = mask.detach().cpu().contiguous().clone()
    facts = {"format": _FORMAT, "version": str(_VERSION), "side": getattr(masks, "side", None) or ""}
    _replace(Path(path), save(tensors, facts | {"sha256": _digest(tensors, facts["side"])}))


def load_masks(path: str | os.PathLike[str]) -> MaskSet:
    """Masks from a file written by :func:`save_masks`; ``manager.masks.update(...)`` applies them.

    Raises:
        InputError: the file cannot be read, is no file of masks, is damaged, or was written by a later version.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{os.fspath(path)!r} cannot be read as masks: {error}") from error
    if facts.get("format") != _FORMAT:
        raise InputError(f"{os.fspath(path)!r} holds no masks: write them with upscale.save_masks")
    version = facts.get("version", "")
    if not version.isdecimal() or int(version) > _VERSION:
        raise InputError(
            f"{os.fspath(path)!r} has version {version or 'none'} of the format, and this upscale reads up to "
            f"{_VERSION}: upgrade upscale"
        )
    side = facts.get("side", "")
    if facts.get("sha256") != _digest(tensors, side):
        raise InputError(f"{os.fspath(path)!r} is damaged: its contents do not match its checksum")
    found = MaskSet(tensors)
    found.side = side or None
    return found


def _digest(tensors: Mapping[str, Tensor], side: str) -> str:
    total = hashlib.sha256(side.encode())
    for name in sorted(tensors):
        mask = tensors[name]
        total.update(f"\0{name}\0{mask.dtype}{tuple(mask.shape)}\0".encode() + mask.numpy().tobytes())
    return total.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Give ``path`` this content in one step: whoever reads it finds the old file or the new one."""
    try:
        with replacing(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error}") from error

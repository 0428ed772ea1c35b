"""Example inputs written as text: ``2x3x64x64``, ``int:2x16``, ``input_ids=int1000:2x16 mask=ones:2x16``."""

from __future__ import annotations

import re

import torch

from .subject import Inputs

GRAMMAR = """\
Inputs are written one after the other, separated by blanks; the first dimension is the batch.
  2x3x64x64        normally distributed floats (in the dtype of the trial)
  int:2x16         integers from 0 to 9; int1000:2x16 from 0 to 999
  ones:2x16        integers, all one (an attention mask)
  bool:2x16        all true
  name=...         any of them as a keyword argument; all inputs are named, or none is"""

_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<kind>int|ones|bool|float)(?P<limit>\d+)?:)?(?P<shape>\d+(x\d+)*)"
)


class InputsError(ValueError):
    """Text that does not describe inputs."""


def parse_inputs(text: str, seed: int = 0) -> Inputs:
    """The tensors that ``text`` describes (see ``GRAMMAR``). Raises ``InputsError``."""
    generator = torch.Generator().manual_seed(seed)
    named: list[tuple[str, torch.Tensor]] = []
    for word in text.split():
        match = _INPUT.fullmatch(word)
        if match is None or (match["limit"] and match["kind"] != "int"):
            raise InputsError(f"cannot read the input {word!r}; write 2x3x64x64, int:2x16 or name=int1000:2x16")
        shape = [int(size) for size in match["shape"].split("x")]
        named.append((match["name"] or "", _tensor(match["kind"], match["limit"], shape, generator)))
    if not named:
        raise InputsError("no inputs are given; write for instance 2x3x64x64")
    if all(name for name, _ in named):
        return dict(named)
    if any(name for name, _ in named):
        raise InputsError(f"either all inputs have a name or none has, in {text!r}")
    return tuple(tensor for _, tensor in named)


def _tensor(kind: str | None, limit: str | None, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if kind == "int":
        return torch.randint(int(limit or 10), shape, generator=generator)
    if kind == "ones":
        return torch.ones(shape, dtype=torch.int64)
    if kind == "bool":
        return torch.ones(shape, dtype=torch.bool)
    return torch.randn(shape, generator=generator)

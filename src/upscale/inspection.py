"""A look at a model before anything is masked: which layers share which channels, and what stops the analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from .capture import capture
from .channels import channel_count
from .flow import analyse_flow
from .mask_arguments import as_call, checked_model
from .mask_groups import find_layers
from .printing import as_text, barrier_lines
from .report import count_parameters
from .segment_objects import segments_of

__all__ = ["Inspection", "Space", "inspect"]


@dataclass(frozen=True)
class Space:
    """Channels that layers share: ``channels`` of them, the layers that write and those that read them."""

    channels: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    ``layers``: name -> (class, channels in, channels out). ``spaces``: channels that layers share. ``apart``: layers
    whose outputs are in no space, because something reads all of them (a model output, a normalisation over channels, a
    barrier) or groups them. ``barriers``: operators of which nothing is known, as (where, operator, reason). ``notes``:
    what capture had to say.
    """

    model: str
    parameters: int
    layers: Mapping[str, tuple[str, int, int]]
    spaces: tuple[Space, ...]
    apart: tuple[str, ...]
    barriers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        data = asdict(self)
        kinds = {name: {"kind": k, "inputs": i, "outputs": o} for name, (k, i, o) in self.layers.items()}
        return data | {"layers": kinds, "barriers": [list(barrier) for barrier in self.barriers]}

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int | None = None) -> str:
        """The findings as text, ``width`` characters wide; None: no line is broken."""
        return as_text((self._table(), self._summary()), width)

    def _table(self) -> Table:
        table = Table(title=f"{self.model}: channels that layers share", title_justify="left")
        table.add_column("channels", justify="right", no_wrap=True)
        table.add_column("written by", overflow="fold")
        table.add_column("read by", overflow="fold")
        for space in self.spaces:
            table.add_row(str(space.channels), ", ".join(space.producers), ", ".join(space.readers))
        return table

    def _summary(self) -> str:
        lines = [
            f"{len(self.layers)} layers with {self.parameters:,} parameters in all, {len(self.spaces)} spaces, "
            f"{len(self.barriers)} barriers"
        ]
        if self.apart:
            lines.append(f"read whole  (by an output, a norm over channels, ...) or in groups: {', '.join(self.apart)}")
        lines += barrier_lines(self.barriers)
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines)


def inspect(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> Inspection:
    """Which channels of ``model`` are shared by which layers. The model is not changed.

    Args:
        model: any module that ``torch.export`` can capture.
        args, kwargs: an example call: a tensor of shape (batch, ...), or a tuple of positional arguments.

    Raises:
        InputError, CaptureError, UnsupportedModelError: see each.
    """
    plain = checked_model(model)
    positional, named = as_call(args)
    program = capture(plain, positional, {**named, **(kwargs or {})})
    flow = analyse_flow(program, partial=False)
    layers = find_layers(plain)
    spaces = tuple(
        Space(found.channels, tuple(m.name for m in found.producers), tuple(m.name for m in found.readers))
        for found in segments_of(flow, layers)
        if found.producers  # the model's own inputs stay
    )
    free = {name for space in spaces for name in space.producers}
    return Inspection(
        type(plain).__name__,
        count_parameters(program.tensors),
        {n: (type(m).__name__, channel_count(m, "input"), channel_count(m, "output")) for n, m in layers.items()},
        spaces,
        tuple(name for name, layer in layers.items() if name not in free and not _is_depthwise(layer)),
        flow.barriers(),
        tuple(program.notes),
    )


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer filters channel by channel: its channels go with those that it reads."""
    return 1 < getattr(layer, "groups", 1) == channel_count(layer, "input") == channel_count(layer, "output")

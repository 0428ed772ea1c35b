"""What was done to a model, as data and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from os import PathLike
from typing import Any

import torch
from rich.table import Table
from torch.fx import Node

from .flow import Flow
from .flow.effects import Contract, PerChannel, size_of
from .plan import Choice, Plan
from .printing import as_text, barrier_lines
from .program import Program, module_path


@dataclass(frozen=True)
class LayerRow:
    """One layer with a weight: channels in and out, parameters and FLOPs per example, before and after."""

    name: str
    kind: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    read: str


@dataclass(frozen=True)
class Report:
    """Before and after of one export.

    ``flops`` counts two operations per multiply-add of convolutions and linear layers, for one example.
    ``reads`` counts how readers get their channels. ``kept`` lists channels that nobody needs and that stay by choice,
    as (layer, "input" or "output", how many, why). ``barriers`` are operators whose channels could not be touched, as
    (where, operator, reason). ``seconds`` gives the time of every stage. Pickles as its text, so that a pickled model
    needs nothing of this library.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    layers: tuple[LayerRow, ...]
    reads: dict[str, int]
    barriers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    kept: tuple[tuple[str, str, int, str], ...]
    removed: tuple[str, ...]
    seconds: dict[str, float]
    error: float | None = None
    batches: tuple[int, ...] = ()
    plan: Plan | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.render()

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (str(self),))

    def __deepcopy__(self, memo: Any) -> Report:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything but the plan as plain data."""
        data = {k: v for k, v in self.__dict__.items() if k not in ("plan", "layers")}
        return data | {"layers": [asdict(row) for row in self.layers]}

    def to_json(self) -> str:
        """The report for machines: a JSON object with ``"format": "upscale-report"`` and a ``"version"``.

        Holds what :meth:`to_dict` holds and, of the plan: reads by kind with their modelled cost, orders, and for each
        shared tensor its channels, producers and readers. Keys are only added within a version.
        """
        from .reporting import as_data

        return json.dumps(as_data(self), allow_nan=False)

    def to_html(self, path: str | PathLike[str], latency: Mapping[str, float] | None = None) -> None:
        """Write the report as one page that needs nothing else: no network, no script, no other file.

        The page shows totals, the network's shared tensors with their producers and readers, for each of them which
        reader takes which channels before and after ordering, layers, reads with their modelled cost, barriers and
        what was kept. The same report gives the same bytes. An existing file is replaced when the new one is whole.

        Args:
            path: where to write; its folder must exist.
            latency: measured times to show, name -> milliseconds, in this order; the others are compared with the
                first.

        Raises:
            InputError: the folder does not exist, the file cannot be written, or a latency is no positive number.
            ImportError: jinja2 is missing (``pip install "upscale-pruning[report]"``).
        """
        from .reporting import write_page

        write_page(self, path, latency)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .reporting import as_cell

        return as_cell(self)

    def render(self, width: int | None = None) -> str:
        """The report as text, ``width`` characters wide; None: no name in the table and no line is broken."""
        return as_text((self._table(), self._summary()), width)

    def _table(self) -> Table:
        table = Table(title="channels before -> after", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("type", "in", "out", "parameters", "MFLOPs", "read"):
            table.add_column(name, justify="left" if name in ("type", "read") else "right", no_wrap=True)
        for row in self.layers:
            table.add_row(
                row.name,
                row.kind,
                _change(*row.inputs),
                _change(*row.outputs),
                _change(*row.parameters),
                _change(*(round(f / 1e6, 2) for f in row.flops)),
                row.read,
            )
        return table

    def _summary(self) -> str:
        lines = [
            f"parameters  {self.parameters[0]:,} -> {self.parameters[1]:,}  ({_share(*self.parameters)})",
            f"FLOPs       {self.flops[0]:,} -> {self.flops[1]:,}  ({_share(*self.flops)}) per example, "
            "convolutions and linear layers, 2 per multiply-add",
            "reads       " + (", ".join(f"{n} {_read_text(k)}" for k, n in sorted(self.reads.items())) or "none"),
        ]
        orders = self.plan.orders if self.plan is not None else ()
        if orders:
            cost, bound = (sum(values) / 1000 for values in zip(*((o.cost, o.bound) for o in orders), strict=True))
            best = sum(o.proven for o in orders)
            lines.append(
                f"order       {len(orders)} shared tensors ordered, {best} of them provably best; what no slice serves "
                f"costs {cost:.1f} µs by the cost model (at least {bound:.1f} in any order)"
            )
        if self.error is not None:
            sizes = ", ".join(map(str, self.batches))
            lines.append(f"verified    largest relative error {self.error:.1e} at batch {sizes}")
        lines.append("seconds     " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        lines += barrier_lines(self.barriers)
        for layer, side, channels, reason in self.kept:
            lines.append(f"kept        {channels} {side} channels of {layer}: {reason}")
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines)


#: What the kinds of reads mean; those that copy say so.
READ_TEXTS = {
    "whole": "the tensor as it is",
    "view": "one slice",
    "gather": "copies by index",
    "concat": "copies slices",
    "channelwise": "copies channel by channel",
    "collect": "copies from several tensors",
}


def _read_text(kind: str) -> str:
    return f"{kind} ({READ_TEXTS[kind]})" if kind in READ_TEXTS else kind


def _change(before: float, after: float) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _share(before: float, after: float) -> str:
    return f"{100 * after / before:.1f} %" if before else "-"


def layer_rows(program: Program, lowered: Program, flow: Flow, plan: Plan) -> tuple[LayerRow, ...]:
    """One row per layer call that contracts channels or filters them one by one."""
    sizes = {n.meta["origin"]: n for n in lowered.graph.nodes if "origin" in n.meta}
    rows = []
    for node, f in flow.nodes.items():
        depthwise = isinstance(f.effect, PerChannel) and f.effect.groups_arg == "groups"
        if not depthwise and not (isinstance(f.effect, Contract) and f.kind == "fresh"):
            continue
        rows.append(_row(program, lowered, node, f.effect, plan, sizes.get(node.name)))  # type: ignore[arg-type]
    return tuple(rows)


def _row(
    program: Program, lowered: Program, node: Node, effect: Contract | PerChannel, plan: Plan, new: Node | None
) -> LayerRow:
    weight = effect.weight if isinstance(effect, Contract) else effect.slices[0][0]
    name = str(weight.target)
    before = program.tensors[name].shape
    after = (
        lowered.tensors[name].shape if new is not None and name in lowered.tensors else torch.Size([0] * len(before))
    )
    if isinstance(effect, Contract):
        out, inner = effect.weight_out, effect.weight_in
        groups = (effect.groups, plan.contractions[node.name].groups if new is not None else 0)
    else:
        out, inner, groups = 0, 0, (1, 1)
    ins = (0, 0) if inner is None else (before[inner] * groups[0], after[inner] * groups[1])
    read = "-" if new is None else _read_kind(plan, node)
    return LayerRow(
        name.rsplit(".", 1)[0] if "." in name else module_path(node) or name,
        str(node.target).split(".")[1],
        ins,
        (before[out], after[out]),
        (_count(program, name), _count(lowered, name) if new is not None else 0),
        (_flops(node, before, effect), _flops(node, after, effect)),
        read,
    )


def kept_by_choice(program: Program, plan: Plan) -> tuple[tuple[str, str, int, str], ...]:
    """The plan's choices with the layers' own names."""
    nodes = {n.name: n for n in program.graph.nodes}
    return tuple((module_path(nodes[c.layer]) or c.layer, c.side, c.channels, _reason(c)) for c in plan.choices)


def _reason(choice: Choice) -> str:
    """Why channels stay, and what they cost by the cost model where it was asked."""
    return f"{choice.reason} ({choice.nanoseconds / 1000:.1f} µs)" if choice.nanoseconds else choice.reason


def _read_kind(plan: Plan, node: Node) -> str:
    kinds = [r.kind for r in plan.reads.get(node.name, {}).values()]
    return kinds[0] if kinds else "-"


def _count(program: Program, weight: str) -> int:
    bias = weight.removesuffix("weight") + "bias"
    return sum(program.tensors[n].numel() for n in (weight, bias) if n in program.tensors)


def _flops(node: Node, weight: torch.Size, effect: Contract | PerChannel) -> int:
    """Two per weight and position where it is applied, for one example."""
    if isinstance(effect, Contract) and effect.weight_in is None:
        return 0
    source = effect.operand if "conv_transpose" in str(node.target) else node
    assert source is not None
    shape = [size_of(s) for s in source.meta["val"].shape]
    channel = effect.out_dim if source is node else (effect.in_dim if isinstance(effect, Contract) else effect.dim)
    positions = prod(s for i, s in enumerate(shape) if i not in (0, channel)) if len(shape) > 1 else 1
    return 2 * prod(weight) * positions


def count_parameters(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values() if isinstance(t, torch.nn.Parameter))

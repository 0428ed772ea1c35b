"""Which batch norm each channel that a layer reads went through last, as the model's graph shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.fx import Node

from ..capture import capture
from ..flow import Flow, Link, analyse_flow
from ..flow.effects import Contract
from ..program import Program

__all__ = ["Scales", "norms_read"]


class Scales(NamedTuple):
    """For each channel of a tensor (channels,): the scale that it carries, and whether a batch norm gave it one."""

    scale: np.ndarray
    known: np.ndarray


def norms_read(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Scales]]:
    """For each layer, call by call, the magnitudes of the batch-norm scales of the channels that it reads.

    Raises ``CaptureError`` where ``torch.export`` cannot capture the model.
    """
    program = capture(model, args, kwargs)
    return _Pass(analyse_flow(program, partial=False), program).read


class _Pass:
    """One pass through the graph that carries scales along; ``read``: what each layer reads, call by call."""

    def __init__(self, flow: Flow, program: Program) -> None:
        self._flow, self._program = flow, program
        self._carried: dict[Node, Scales] = {}
        self.read: dict[str, list[Scales]] = defaultdict(list)
        for node, f in flow.nodes.items():
            if isinstance(f.effect, Contract):
                layer = str(f.effect.weight.target).removesuffix(".weight")
                self.read[layer] += [self._through([link]) for link in f.links]
            elif f.channels is not None:
                self._carried[node] = self._of_norm(node, f.channels.size) or self._through(f.links)

    def _of_norm(self, node: Node, size: int) -> Scales | None:
        """The batch norm's own scale, where the node is one that has a scale."""
        weight = node.args[1] if "batch_norm" in str(node.target) else None
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return None
        scale = self._program.tensors[str(weight.target)].detach().abs().cpu().double().numpy()
        return Scales(scale, np.ones(size, dtype=bool)) if len(scale) == size else None

    def _through(self, links: Sequence[Link]) -> Scales:
        """What comes together over several links: the sum of the scales."""
        parts = [self._behind(link) for link in links]
        if not parts or len({len(p.scale) for p in parts}) > 1:
            return Scales(np.zeros(0), np.zeros(0, dtype=bool))
        return Scales(np.sum([p.scale for p in parts], axis=0), np.any([p.known for p in parts], axis=0))

    def _behind(self, link: Link) -> Scales:
        """What the operand's channels carry, in the order in which the link pairs them."""
        positions = link.positions if link.positions.ndim == 2 else link.positions[:, None]
        carried = self._carried.get(link.operand)
        if link.anchored or carried is None or not len(carried.scale):  # anchored: read along another dimension
            return Scales(np.zeros(len(positions)), np.zeros(len(positions), dtype=bool))
        there = positions >= 0
        scale, known = carried.scale[positions] * there, carried.known[positions] & there
        return Scales(scale.sum(axis=1), known.any(axis=1))

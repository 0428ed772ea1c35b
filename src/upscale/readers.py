"""Who reads which channels of which tensors: the spaces in which contiguous masks are chosen.

Unlike :mod:`upscale.segments`, which asks what must be masked together, this follows each layer's read as the planner
does it: through normalisations and activations that nobody else reads, and through a concatenation that has no other
reader, to the tensors that are stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from .contiguous import Chain
from .flow import Flow, FlowNode, Link
from .flow.effects import Contract
from .plan.keep import decide_kept
from .plan.sources import locate
from .plan.union import DisjointSets
from .segments import pinned_classes

__all__ = ["PieceView", "ReaderView", "Reading", "SpaceView", "find_spaces"]


@dataclass(frozen=True, eq=False)
class PieceView:
    """What a layer reads of one stored tensor.

    ``channels``: int64 (channels,), numbers within the chain; ``places``: int64 (channels, k), the inputs of the layer
    that each of them is.
    """

    chain: int
    channels: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class ReaderView:
    """A layer whose mask can be chosen, and its pieces."""

    layer: str
    pieces: tuple[PieceView, ...]


@dataclass(frozen=True, eq=False)
class SpaceView:
    """Chains of channels and all layers that read any of them."""

    chains: tuple[Chain, ...]
    readers: tuple[ReaderView, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """``spaces``, and the layers that are in none, with the reason."""

    spaces: tuple[SpaceView, ...]
    skipped: dict[str, str]


@dataclass(frozen=True, eq=False)
class _Part:
    """A read of one stored tensor: the order class of each channel read, and the layer's input that it is."""

    tensor: Node
    classes: np.ndarray
    inputs: np.ndarray


def find_spaces(flow: Flow, layers: Container[str], skipped: Mapping[str, str]) -> Reading:
    """The spaces of the input channels of ``layers``, but of those in ``skipped``, which keep all they read."""
    return _Finder(flow, layers, skipped).run()


class _Finder:
    def __init__(self, flow: Flow, layers: Container[str], skipped: Mapping[str, str]) -> None:
        self.flow, self.layers = flow, layers
        self.kept = decide_kept(flow, fuse=True, hoist=True)
        self.total = 1 + max((int(o.max()) for o in self.kept.order.values() if len(o)), default=0)
        self.skipped = dict(skipped)
        self.pinned = pinned_classes(flow, self.kept, self.total)
        self.fixed = np.zeros(self.total, dtype=bool)
        for node in self.kept.forced | self.kept.ordered:
            if node in self.kept.order:
                self.fixed[self.kept.order[node]] = True
        self.reads: dict[str, list[_Part]] = {}

    def run(self) -> Reading:
        for node, f in self.flow.nodes.items():
            if node in self.flow.used and f.kind == "fresh" and isinstance(f.effect, Contract):
                self._note(f, f.effect)
        blocks = self._blocks()
        for layer, parts in list(self.reads.items()):
            if any(self._lies_apart(part, blocks) for part in parts):
                self._leave(layer, parts, "reads channels that lie apart")
        return Reading(tuple(self._spaces(blocks)), self.skipped)

    # -- what a layer reads -----------------------------------------------------------------------------------------

    def _note(self, f: FlowNode, effect: Contract) -> None:
        """File a layer's read, or pin what it reads if its mask is not free."""
        layer = str(effect.weight.target).removesuffix(".weight")
        for link in f.links:
            if link.anchored:
                continue
            parts = self._parts(link, link.positions, np.arange(len(link.positions)))
            reason = self._why_not(f, layer, parts, len(link.positions))
            if reason is None:
                self.reads[layer] = parts
            else:
                self._leave(layer, parts, reason)

    def _leave(self, layer: str, parts: list[_Part], reason: str) -> None:
        if layer in self.layers:
            self.skipped.setdefault(layer, reason)
        for part in [*parts, *self.reads.pop(layer, ())]:
            self.pinned[part.classes] = True

    def _parts(self, link: Link, positions: np.ndarray, inputs: np.ndarray) -> list[_Part]:
        """The stored tensors behind a link, looking through operators that read only what this reader wants."""
        place = locate(self.flow, self.kept.virtual, link, positions)
        found = []
        for number, tensor in enumerate(place.tensors):
            here = place.which == number
            if tensor not in self.kept.order:
                continue
            further = self._read_through(tensor)
            if further is not None:
                found += self._parts(further, further.positions[place.position[here]], inputs[here])
                continue
            channels = self.flow.nodes[tensor].channels
            assert channels is not None
            found.append(_Part(tensor, self.kept.order[tensor][channels.units[place.position[here]]], inputs[here]))
        return found

    def _read_through(self, tensor: Node) -> Link | None:
        """The link behind a tensor that is made for one reader and holds just what that reader wants."""
        f = self.flow.nodes[tensor]
        if tensor not in self.kept.hoisted or len(tensor.users) != 1 or f.links[0].positions.ndim != 1:
            return None
        return f.links[0]

    def _why_not(self, f: FlowNode, layer: str, parts: list[_Part], inputs: int) -> str | None:
        """Why a layer's mask cannot be chosen freely; None if it can."""
        found = np.concatenate([p.classes for p in parts]) if parts else np.zeros(0, dtype=np.int64)
        reasons = (
            (layer not in self.layers or layer in self.skipped, self.skipped.get(layer, "")),
            (f.pinned, "its weight has a second use"),
            (f.twins is not None or layer in self.reads, "is called twice"),
            (f.groups > 1, "grouped convolution: its groups could no longer be of one size"),
            (len(found) < inputs, "reads channels that no layer writes"),
            (bool(self.fixed[found].any()), "reads a tensor whose channels stay in their order"),
            (any(_table(p) is None for p in parts), "reads a channel at places that lie apart"),
        )
        return next((reason for holds, reason in reasons if holds), None)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _blocks(self) -> list[np.ndarray]:
        """Order classes that the same stored tensors hold and the same reads see, in the order of the widest tensors:
        finer than the planner's, so that what is contiguous for them is so for it."""
        sets = {np.unique(o).tobytes(): np.unique(o) for o in self.kept.order.values()}
        sets.update({np.unique(p.classes).tobytes(): np.unique(p.classes) for ps in self.reads.values() for p in ps})
        signature = np.zeros(self.total, dtype=np.uint64)
        for number, classes in enumerate(sets.values(), start=1):
            signature[classes] = signature[classes] * np.uint64(1_000_003) + np.uint64(number)
        first = np.full(self.total, -1)
        met = 0
        for node in sorted(self.kept.stored, key=lambda n: -len(self.kept.order[n])):
            classes = self.kept.order[node]
            new, where = np.unique(classes[first[classes] < 0], return_index=True)
            first[new] = met + where
            met += len(classes)
        groups: dict[int, list[int]] = defaultdict(list)
        known = np.flatnonzero(first >= 0)
        for c in known[np.argsort(first[known], kind="stable")].tolist():
            groups[int(signature[c])].append(c)
        return [np.array(g) for g in groups.values()]

    def _lies_apart(self, part: _Part, blocks: list[np.ndarray]) -> bool:
        """Whether other channels of the tensor stand between those that a reader sees."""
        firsts = np.array([block[0] for block in blocks])
        seen = np.isin(firsts[np.isin(firsts, self.kept.order[part.tensor])], part.classes)
        return int((np.diff(seen.astype(int), prepend=0) == 1).sum()) > 1

    # -- spaces -----------------------------------------------------------------------------------------------------

    def _spaces(self, blocks: list[np.ndarray]) -> list[SpaceView]:
        block_of = np.full(self.total, -1)
        for number, block in enumerate(blocks):
            block_of[block] = number
        chains, spaces = DisjointSets(len(blocks)), DisjointSets(len(blocks))
        for parts in self.reads.values():
            everything = np.concatenate([block_of[p.classes] for p in parts])
            spaces.join(everything, np.full(len(everything), everything[0]))
            for part in parts:
                mine = block_of[part.classes]
                chains.join(mine, np.full(len(mine), mine[0]))
        chain_of, space_of = chains.roots(), spaces.roots()
        layers: dict[int, list[str]] = defaultdict(list)
        for layer, parts in self.reads.items():
            layers[int(space_of[block_of[parts[0].classes[0]]])].append(layer)
        found = []
        for root, names in layers.items():
            members = np.flatnonzero(space_of == root)
            roots = np.unique(chain_of[members]).tolist()
            held = [[blocks[b] for b in members.tolist() if chain_of[b] == r] for r in roots]
            found.append(self._space(names, held))
        return found

    def _all_see(self, layers: list[str], blocks: list[np.ndarray]) -> bool:
        """Whether whoever reads any of the blocks reads all of them, so that they may stand in any order."""
        classes = np.concatenate(blocks)
        counts = [int(np.isin(classes, part.classes).sum()) for layer in layers for part in self.reads[layer]]
        return all(count in (0, len(classes)) for count in counts)

    def _space(self, layers: list[str], held: list[list[np.ndarray]]) -> SpaceView:
        chain_of, number = np.full(self.total, -1), np.full(self.total, -1)
        chains = []
        for k, blocks in enumerate(held):
            if len(blocks) > 2 and self._all_see(layers, blocks):
                blocks = _widest_outside(blocks)
            classes = np.concatenate(blocks)
            chain_of[classes], number[classes] = k, np.arange(len(classes))
            chains.append(Chain(tuple(number[b] for b in blocks), self.pinned[classes]))
        readers = []
        for layer in layers:
            pieces = []
            for part in self.reads[layer]:
                table = _table(part)
                assert table is not None
                classes, places = table
                pieces.append(PieceView(int(chain_of[classes[0]]), number[classes], places))
            readers.append(ReaderView(layer, tuple(pieces)))
        return SpaceView(tuple(chains), tuple(readers))


def _widest_outside(blocks: list[np.ndarray]) -> list[np.ndarray]:
    """The two widest blocks at the ends: there a channel can be kept by some readers and not by others."""
    ranked = sorted(blocks, key=lambda block: -len(block))
    return [*ranked[:1], *ranked[2:], *ranked[1:2]]


def _table(part: _Part) -> tuple[np.ndarray, np.ndarray] | None:
    """The classes of a read, and the inputs that each is: equally many, side by side. None where they are not."""
    order = np.argsort(part.classes, kind="stable")
    classes, counts = np.unique(part.classes, return_counts=True)
    if not len(classes) or (counts != counts[0]).any():
        return None
    places = part.inputs[order].reshape(len(classes), -1)
    return (classes, places) if (np.diff(places, axis=1) == 1).all() else None

"""From flow to plan: layouts of all stored tensors, the reads of all operators, and what to cut from each weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch.fx import Node

from ..errors import InputError
from ..flow import Flow, FlowNode, Link
from ..flow.effects import Barrier, Contract, reads_values
from .cost import ReadCost, Setting, memory_of
from .keep import Kept, decide_kept
from .model import MODES, Choice, Contraction, Layout, Mode, Plan, ProductForm, Read
from .products import form_of
from .queue import as_issued
from .reads import choose_read, price_of, widest_worth
from .recording import record_spaces
from .rounding import Rounding, rounded_up
from .sources import Located, locate
from .spaces import find_parts, rank_classes
from .streams import shrinking_sums
from .worth import Copied, dearer_than_whole

_FILLED = "all groups of a grouped convolution are of one size"
_ROUND = "a multiple of channels is kept, less saves no time"
_WIDE = "reading them with zero weights costs less than picking the others"


def make_plan(flow: Flow, mode: Mode = "auto", reorder: bool = True, setting: Setting | None = None) -> Plan:
    """Plan the smaller program.

    mode: ``auto`` reorders channels and reads them in the way that costs least in ``setting``; ``gather`` keeps the
    original order and reads every proper subset by one ``index_select``; ``baseline`` reads it channel by channel, at
    the layer that wants it (Wan et al. 2023, section 4). ``reorder=False`` keeps the original order in ``auto`` too.

    Raises:
        InputError: ``mode`` is none of these.
    """
    if mode not in MODES:
        raise InputError(f"reads={mode!r}: choose one of {', '.join(map(repr, MODES))}")
    setting = as_issued(flow, setting or Setting())
    if mode != "auto":
        kept = decide_kept(flow, fuse=False, hoist=False, joins_whole=mode == "baseline")
        builder = _Builder(flow, kept, mode, False, setting)
        return builder.recorded(builder.run())
    sums = shrinking_sums(flow, setting)
    rounding = Rounding(flow, setting)
    kept = decide_kept(flow, fuse=True, hoist=True, rounding=rounding, shrinking=sums)
    builder = _Builder(flow, kept, mode, reorder, setting)
    plan = builder.run()
    whole = dearer_than_whole(flow, kept, builder.copied, setting)
    if whole:
        kept = decide_kept(flow, fuse=True, hoist=True, whole=whole, rounding=rounding, shrinking=sums)
        builder = _Builder(flow, kept, mode, reorder, setting)
        plan = builder.run()
    return builder.recorded(plan)


class _Builder:
    def __init__(self, flow: Flow, kept: Kept, mode: Mode, reorder: bool, setting: Setting) -> None:
        self.flow, self.kept, self.mode, self.setting = flow, kept, mode, setting
        self.reorder = reorder
        self.ranking = rank_classes(flow, kept, reorder, setting)
        self.parts = find_parts(flow, kept)
        self.positions: dict[Node, np.ndarray] = {}  # layout of every stored tensor
        self.physical: dict[Node, np.ndarray] = {}  # original position -> place in the layout
        self.reads: dict[str, dict[str, Read]] = {}
        self.contractions: dict[str, Contraction] = {}
        self.constants: dict[str, dict[str, tuple[float, ...]]] = {}
        self.choices: list[Choice] = []
        self.partial: dict[str, dict[str, tuple[int, ...]]] = {}
        self.tables: list[str] = []
        self.copied: dict[Node, Copied] = {}

    def run(self) -> Plan:
        for node in self.kept.stored:
            self._lay_out(node)
        for node, f in self.flow.nodes.items():
            if node in self.flow.used and node not in self.kept.virtual:
                self._plan_node(node, f)
        layouts = {n.name: self._layout(n) for n in self.kept.stored}
        virtual = tuple(n.name for n in self.flow.nodes if n in self.kept.virtual)
        dead = tuple(n.name for n in self.flow.nodes if n not in self.flow.used and n.op == "call_function")
        return Plan(
            self.mode,
            layouts,
            self.reads,
            self.contractions,
            self.constants,
            self.partial,
            tuple(self.tables),
            virtual,
            dead,
            self.flow.barriers(),
            tuple(self.choices),
            self.ranking.orders,
        )

    def recorded(self, plan: Plan) -> Plan:
        """``plan`` with its spaces, for reports."""
        return replace(plan, spaces=record_spaces(self.flow, self.kept, self.ranking.spaces))

    # -- layouts ------------------------------------------------------------------------------------------------

    def _lay_out(self, node: Node) -> None:
        f = self.flow.nodes[node]
        assert f.channels is not None
        if node in self.kept.forced:
            positions = np.arange(f.channels.size)
        elif f.merge != (1, 1):
            positions = self._merged(node, f)
        else:
            units = f.channels.units
            mine = np.flatnonzero(self.kept.kept[node][units])
            positions = mine
            if self.reorder and node not in self.kept.ordered:
                rank = self.ranking.rank[self.kept.order[node][units[mine]]]
                positions = mine[np.lexsort((mine, rank, self._parts(node)[mine]))]
        self.positions[node] = positions
        self.physical[node] = np.full(f.channels.size, -1)
        self.physical[node][positions] = np.arange(len(positions))

    def _parts(self, node: Node) -> np.ndarray:
        """Which of several readers' blocks a position is in, where one class stands in several: a fused query, key and
        value, the two halves of a gate. Each block stays together."""
        return self.parts.get(node, np.zeros(len(self.flow.nodes[node].channels.units), dtype=np.int64))  # type: ignore

    def _merged(self, node: Node, f: FlowNode) -> np.ndarray:
        """The operand's channels in order, each as often as merging repeats it."""
        assert f.channels is not None
        outer, inner = f.merge
        count = f.channels.size // (outer * inner)
        unit = f.channels.units[np.arange(count) * inner]  # of every channel of the operand
        mine = np.flatnonzero(self.kept.kept[node][unit])
        if self.reorder:
            mine = mine[np.lexsort((mine, self.ranking.rank[self.kept.order[node][unit[mine]]]))]
        grid = np.arange(outer)[:, None, None] * count + mine[None, :, None]
        return (grid * inner + np.arange(inner)).reshape(-1)

    def _layout(self, node: Node) -> Layout:
        channels = self.flow.nodes[node].channels
        assert channels is not None
        return Layout(channels.dim, channels.size, tuple(self.positions[node].tolist()))

    # -- reads --------------------------------------------------------------------------------------------------

    def _plan_node(self, node: Node, f: FlowNode) -> None:
        if isinstance(f.effect, Contract) and f.kind == "fresh":
            self._contraction(node, f, f.effect)
        elif f.kind == "split":
            assert f.split is not None
            blocks = f.links[0].positions[self.positions[node]]
            self._read(node, f.links[0], f.split.in_order(blocks))
        elif f.kind in ("transit", "concat", "select", "list"):
            for link in f.links:
                if (node, link.operand) in self.flow.replaced:
                    self._replace(node, link)
                elif (node, link.operand) in self.flow.partial:
                    self._read_in_part(node, link)
                else:
                    self._read(node, link, self._link_positions(f, link))
        for operand, ordered in f.whole:
            self._read_whole(node, operand, ordered)
        if f.kind in ("opaque", "barrier") and not reads_values(node):
            for n in node.all_input_nodes:  # only the size of a tensor that is never stored: one channel will do
                if n in self.kept.virtual:
                    link = Link(n, self._dim(n), np.arange(len(self.flow.live[n])))
                    self._read(node, link, np.flatnonzero(self.flow.live[n])[:1])
        elif f.kind in ("opaque", "barrier"):
            for n in node.all_input_nodes:
                if self.flow.nodes[n].channels is not None and self.flow.nodes[n].kind != "list":
                    self._read_whole(node, n, ordered=not isinstance(f.effect, Barrier) or f.effect.ordered)

    def _read_in_part(self, node: Node, link: Link) -> None:
        """An addition takes the channels of an operand that are not zero."""
        positions = self.positions[node]
        joins = self.flow.partial[node, link.operand][positions]
        self._read(node, link, link.positions[positions[joins]])
        self.partial.setdefault(node.name, {})[link.operand.name] = tuple(np.flatnonzero(joins).tolist())
        if memory_of(node, self._dim(node), self.setting.examples).innermost:
            self.tables.append(node.name)

    def _dim(self, node: Node) -> int:
        channels = self.flow.nodes[node].channels
        assert channels is not None
        return channels.dim

    def _link_positions(self, f: FlowNode, link: Link) -> np.ndarray:
        positions = self.positions[f.node]
        if f.merge != (1, 1):  # the operand is read once; the movement itself repeats its channels
            outer, inner = f.merge
            return positions[: len(positions) // outer : inner] // inner
        return positions if f.kind == "concat" else link.positions[positions]

    def _read(self, node: Node, link: Link, positions: np.ndarray) -> None:
        """Plan how ``node`` gets ``positions`` of a link's operand (for a concatenation: of its own channels)."""
        f = self.flow.nodes[node]
        if f.kind == "concat":
            if link is not f.links[0]:
                return  # one read serves the whole concatenation, filed under its first operand
            whole = Link(node, link.dim, np.arange(len(f.links[0].positions)))
            place = locate(self.flow, self.kept.virtual | {node}, whole, positions)
        else:
            place = locate(self.flow, self.kept.virtual, link, positions)
        self._file(node, link, self._choose(node, link, place))

    def _choose(self, node: Node, link: Link, place: Located) -> Read:
        indices = place.position.copy()
        sizes = []
        for i, source in enumerate(place.tensors):
            here = place.which == i
            if source in self.physical and not (link.anchored and source is link.operand):
                indices[here] = self.physical[source][place.position[here]]
                sizes.append(len(self.positions[source]))
            else:
                sizes.append(self._full_size(source, link.dim))
        if not place.tensors:  # constants only: any tensor behind the link gives them their shape
            base = self._stored_behind(link)
            place = Located((base,), place.which, place.position, place.fill)
            sizes = [0]
        names = tuple(s.name for s in place.tensors)
        cost = self._cost(place.tensors[0], link.dim, node)
        kind, pieces = choose_read(names, sizes, place.which, indices, place.fill, self.mode, cost)
        innermost = self.mode == "auto" and kind in ("gather", "collect") and cost.memory.innermost
        price = price_of(kind, pieces, sizes, cost)
        if kind not in ("whole", "view"):
            self.copied[node] = Copied(price, cost, tuple(sizes), len(place.which))
        return Read(node.name, link.operand.name, link.dim, kind, pieces, innermost, price)

    def _cost(self, source: Node, dim: int, reader: Node) -> ReadCost:
        rows = len(self.positions[reader]) if reader in self.positions else None
        return self.setting.reading(source, dim, self.flow.nodes[reader], rows)

    def _product(self, node: Node, link: Link) -> ProductForm:
        """Whether a layer is a matrix product on the slice that it reads."""
        read = self.reads[node.name][link.operand.name]
        if not self.setting.products or self.mode != "auto" or read.kind != "view":
            return ""
        (piece,) = read.pieces
        source = next(n for n in self.flow.nodes if n.name == piece.source)
        return form_of(source, read.dim) if self._cost(source, read.dim, node).multiplies(len(piece.indices)) else ""

    def _stored_behind(self, link: Link) -> Node:
        """A tensor of the shape of a link's operand, but for the channels."""
        node = link.operand
        while node in self.kept.virtual or self.flow.nodes[node].kind == "concat":
            behind = [k.operand for k in self.flow.nodes[node].links]
            node = next((n for n in behind if n in self.flow.used or n in self.kept.virtual), behind[0])
        return node

    def _full_size(self, node: Node, dim: int) -> int:
        return int(node.meta["val"].shape[dim])

    def _file(self, node: Node, link: Link, read: Read) -> None:
        self.reads.setdefault(node.name, {})[link.operand.name] = read

    def _read_whole(self, node: Node, operand: Node, ordered: bool) -> None:
        """All channels of ``operand``; a tensor that stands whole and in order needs nothing."""
        f = self.flow.nodes[operand]
        assert f.channels is not None
        if any(link.operand is operand for link in self.flow.nodes[node].links):
            return  # read as a link already; a mixing operator takes them all
        if operand in self.positions and (not ordered or operand in self.kept.forced):
            return
        if self.flow.nodes[operand].kind == "list":
            return
        link = Link(operand, f.channels.dim, np.arange(f.channels.size))
        self._file(node, link, self._choose(node, link, locate(self.flow, self.kept.virtual, link, link.positions)))

    def _replace(self, node: Node, link: Link) -> None:
        constants = self.flow.constants[link.operand]
        assert constants is not None
        place = link.positions[self.positions[node]]
        self.constants.setdefault(node.name, {})[link.operand.name] = tuple(
            float(v) for v in constants.value.double().numpy()[place]
        )

    # -- contractions -------------------------------------------------------------------------------------------

    def _contraction(self, node: Node, f: FlowNode, effect: Contract) -> None:
        demand, rows = self.flow.demands[node], self.positions[node]
        columns: tuple[int, ...] | None = None
        product: ProductForm = ""
        blank = np.array([], dtype=np.int64)
        if effect.operand is not None:
            link = f.links[0]
            wanted = np.flatnonzero(self.kept.grouped.get(node, demand.inputs))
            price = 0.0
            if not f.pinned and f.twins is None and effect.groups == 1:
                price = self.setting.computing(node, effect, len(rows))
                wanted = self._widened(node, link, self._as_stored(link, wanted), price)
            self._read(node, link, link.positions[wanted])
            product = self._product(node, link)
            columns = None if f.pinned else tuple(wanted.tolist())
            blank = wanted[~demand.inputs[wanted]] if demand.blank is None else np.flatnonzero(demand.blank)
            if len(blank) and not f.pinned:
                near = len(blank) < self.setting.round_to
                reason = _FILLED if effect.groups > 1 else _ROUND if near else _WIDE
                self.choices.append(Choice(node.name, "input", len(blank), reason, len(blank) * price))
        if spare := int(self.kept.rounded[node][self.flow.nodes[node].channels.units[rows]].sum()):  # type: ignore
            self.choices.append(Choice(node.name, "output", spare, _ROUND))
        if demand.filled is not None and (spare := int((demand.filled | ~self.flow.live[node])[rows].sum())):
            self.choices.append(Choice(node.name, "output", spare, _FILLED))
        groups = len(np.unique(rows // (len(self.physical[node]) // effect.groups)))
        self.contractions[node.name] = Contraction(
            tuple(rows.tolist()),
            columns,
            tuple(np.flatnonzero(demand.constant).tolist()),
            tuple(demand.delta.tolist()) if bool(demand.delta.any()) else (),
            demand.absorber.name if demand.absorber is not None else None,
            groups,
            tuple(blank.tolist()),
            product,
        )

    def _widened(self, node: Node, link: Link, wanted: np.ndarray, price: float) -> np.ndarray:
        """``wanted``, or more of what the tensor behind it holds, where that costs less than picking them.

        The baseline picks whole channels: of a flattened one all pixels, as the reference implementation does.
        """
        place = locate(self.flow, self.kept.virtual, link, link.positions[wanted])
        source = place.tensors[0] if len(place.tensors) == 1 and not (place.which < 0).any() else None
        if source is None or source is not link.operand or source not in self.positions or link.anchored:
            return wanted
        if self.mode == "baseline":
            units = self.flow.nodes[source].channels.units  # type: ignore[union-attr]
            return np.flatnonzero(np.isin(units[link.positions], units[link.positions[wanted]]))
        if self.mode != "auto":
            return wanted
        if node in self.kept.whole:
            return self.positions[source]
        cost = self._cost(source, link.dim, node)
        # This operand is read straight: its positions are the layer's columns.
        stored = self.positions[source]
        wider = widest_worth(stored, wanted, price, cost)
        return rounded_up(stored, wider, self.setting.rounded(len(wider), len(stored)))

    def _as_stored(self, link: Link, wanted: np.ndarray) -> np.ndarray:
        """A contraction takes its inputs in any order: in that in which they are stored."""
        place = locate(self.flow, self.kept.virtual, link, link.positions[wanted])
        keys = place.position.copy()
        first = np.full(len(place.tensors) + 1, len(wanted))
        for i, source in enumerate(place.tensors):
            here = place.which == i
            first[i] = int(np.flatnonzero(here)[0])
            if source in self.physical and not (link.anchored and source is link.operand):
                keys[here] = self.physical[source][place.position[here]]
        sources = first[place.which]
        if self.mode != "auto":
            return wanted
        return wanted[np.lexsort((keys, sources))]

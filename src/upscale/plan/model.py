"""The plan: which channels every tensor keeps, in which order, and how every operator reads them.

Plain data - names, numbers and tuples. No torch module, no graph: it can be printed, compared, saved and tested
without a network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .shared import Space

Mode = Literal["auto", "gather", "baseline"]
MODES: tuple[Mode, ...] = ("auto", "gather", "baseline")
ProductForm = Literal["", "rows", "planes"]


@dataclass(frozen=True)
class Layout:
    """The channels one tensor holds: original positions along ``dim``, in the order they stand there.

    ``size`` is the original number of positions.
    """

    dim: int
    size: int
    positions: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return self.positions == tuple(range(self.size))


@dataclass(frozen=True)
class Piece:
    """Channels ``indices`` (of the source as it then stands) or, without a source, as many channels of ``fill``."""

    source: str | None
    indices: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class Read:
    """How ``reader`` gets the channels it wants of ``operand``.

    kind: ``whole`` (the tensor as it is), ``view`` (one contiguous slice), ``gather`` (one index_select),
    ``concat`` (several slices one after the other), ``channelwise`` (channel by channel, the paper's baseline),
    ``collect`` (sources joined, then one index_select). ``innermost``: channels are neighbours in memory, so a gather
    is done there, on a table of all other places. ``nanoseconds``: what it costs, by the cost model.
    """

    reader: str
    operand: str
    dim: int
    kind: str
    pieces: tuple[Piece, ...]
    innermost: bool = False
    nanoseconds: float = 0.0

    @property
    def copies(self) -> bool:
        return self.kind not in ("whole", "view")


@dataclass(frozen=True)
class Contraction:
    """What becomes of one layer's weight: rows and columns kept (original indices, in order), rows emitted as zero,
    and what folded constants add to the bias (or to ``absorber``'s running mean, negated). ``groups``: how many groups
    a grouped convolution keeps; ``blank``: columns emitted as zero. ``product``: whether a 1x1 convolution is emitted
    as a matrix product, and of what: ``"rows"`` (a row for every place), ``"planes"`` (a matrix for every example) or
    ``""`` (a convolution stays one)."""

    rows: tuple[int, ...]
    columns: tuple[int, ...] | None  # None: all (no inputs)
    zero_rows: tuple[int, ...]
    delta: tuple[float, ...]
    absorber: str | None
    groups: int = 1
    blank: tuple[int, ...] = ()
    product: ProductForm = ""


@dataclass(frozen=True)
class Choice:
    """Channels of a layer that nobody needs and that stay all the same, and why."""

    layer: str  # name of the call
    side: str  # "input" or "output"
    channels: int
    reason: str
    nanoseconds: float = 0.0  # what they cost, by the cost model, for the planned batch


@dataclass(frozen=True)
class Order:
    """How well one space could be ordered: its channels and readers, what the readers pay for not getting one slice
    each, and what they pay at least in any order (nanoseconds, by the cost model). ``proven``: no order is better."""

    channels: int
    readers: int
    cost: float
    bound: float
    proven: bool


@dataclass(frozen=True)
class Plan:
    """Everything lowering needs to know. Keys are node names of the captured graph."""

    mode: Mode
    layouts: dict[str, Layout] = field(default_factory=dict)
    reads: dict[str, dict[str, Read]] = field(default_factory=dict)  # reader -> operand -> read
    contractions: dict[str, Contraction] = field(default_factory=dict)
    constants: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)  # reader -> operand -> values
    # addition -> operand -> the places in the result's layout to which it adds; elsewhere it is zero
    partial: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()  # additions in part whose channels are neighbours in memory: added to rows of a table
    virtual: tuple[str, ...] = ()  # nodes that are never executed: their readers read through them
    dead: tuple[str, ...] = ()  # nodes whose result nobody needs
    barriers: tuple[tuple[str, str, str], ...] = ()  # (where, operator, reason)
    choices: tuple[Choice, ...] = ()
    orders: tuple[Order, ...] = ()  # of the spaces with several readers of a part
    spaces: tuple[Space, ...] = ()  # for reports only: lowering does not need them

    def read_counts(self) -> Counter[str]:
        return Counter(read.kind for by_operand in self.reads.values() for read in by_operand.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested dicts, lists and numbers, ready for ``json.dumps``."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`, also after a round trip through JSON."""
        return Plan(
            mode=data["mode"],
            layouts={k: Layout(v["dim"], v["size"], tuple(v["positions"])) for k, v in data["layouts"].items()},
            reads={r: {o: _read(v) for o, v in by.items()} for r, by in data["reads"].items()},
            contractions={k: _contraction(v) for k, v in data["contractions"].items()},
            constants={r: {o: tuple(v) for o, v in by.items()} for r, by in data["constants"].items()},
            partial={r: {o: tuple(v) for o, v in by.items()} for r, by in data["partial"].items()},
            tables=tuple(data["tables"]),
            virtual=tuple(data["virtual"]),
            dead=tuple(data["dead"]),
            barriers=tuple(tuple(b) for b in data["barriers"]),
            choices=tuple(Choice(**c) for c in data["choices"]),
            orders=tuple(Order(**o) for o in data["orders"]),
            spaces=tuple(Space.from_dict(s) for s in data.get("spaces", ())),
        )


def _read(v: dict[str, Any]) -> Read:
    pieces = tuple(Piece(p["source"], tuple(p["indices"]), p["fill"]) for p in v["pieces"])
    return Read(v["reader"], v["operand"], v["dim"], v["kind"], pieces, v["innermost"], v["nanoseconds"])


def _contraction(v: dict[str, Any]) -> Contraction:
    columns = None if v["columns"] is None else tuple(v["columns"])
    delta, blank = tuple(v["delta"]), tuple(v["blank"])
    given = (delta, v["absorber"], v["groups"], blank, v.get("product", ""))
    return Contraction(tuple(v["rows"]), columns, tuple(v["zero_rows"]), *given)

"""Choose channels by importance and zero them: the masks that ``upscale.export`` then turns into speed.

*Unconstrained* masks let every layer choose its own channels. *Constrained* masks make all layers on a shared
tensor choose the same ones, as classical structured pruning does: no copies afterwards, but less freedom and
so less accuracy. *Contiguous* masks are between the two: every layer chooses its own channels, but only so
that all of them can read a contiguous slice of one common order. Nothing is copied either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .channels import Side, channel_count, entries_of, is_layer
from .errors import InputError, NothingToPruneError, UnsupportedModelError
from .grouping import tied_groups
from .importance import Heuristic, Subject, channel_scores
from .mask_arguments import IMAGE_SIZES, as_call, checked_amount, checked_model, guessed_inputs, one_of
from .observe import Observation, observe
from .ranking import Group, group_scores, pick, pick_globally

if TYPE_CHECKING:
    from .contiguous_masks import LaidOut
    from .readers import Reading
    from .retained import Retained

__all__ = ["MaskingManager"]

Method = Literal["unconstrained", "constrained", "contiguous"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class MaskingManager:
    """Zero the least important channels of a model's layers, in place.

    Parameters
    ----------
    model:
        Any ``nn.Module``. Convolutions, transposed convolutions and linear layers get masks; the projections
        of ``nn.MultiheadAttention`` do not.
    side:
        ``"input"``: a layer's weight is zeroed for some of the channels that it reads. Grouped and depthwise
        convolutions are left alone on this side (unless a constrained group says otherwise), and so is every
        layer that reads a model input. ``"output"``: the rows of some of the channels that a layer writes are
        zeroed, with its bias and the weight and bias of a batch norm that directly follows, so that the
        channel is zero where it is read. The last layers, whose result reaches a model output, are left alone
        on this side.
    method:
        ``"unconstrained"``, ``"constrained"`` or ``"contiguous"`` (see the module's first lines). Contiguous
        masks are for the input side. For the channels that several layers read they choose one order, and for
        each layer an interval of it, that together retain much of the importance: at least as much as
        constrained masks of the same sizes, and all that unconstrained ones retain where one or two layers read
        what one layer writes. Of a flattened tensor whole channels are masked, not single pixels.
    is_global:
        Rank all layers' channels together (each layer's scores divided by their root mean square, so that
        layers of different scale compare) instead of taking the same share of each layer.
    example_inputs:
        What the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword
        arguments. Needed to see which layers read a model input, which write an output and which batch norm
        follows which layer. Without it, images of 224, 64 and 32 pixels are tried; where none fits,
        unconstrained masks go by the order in which the layers are registered, and the other two methods
        raise ``InputError``.

    Attributes
    ----------
    masked: dict[str, Tensor]
        After :meth:`mask`: for each layer, the indices of its zeroed channels (int64, sorted).
    skipped: dict[str, str]
        The layers that get no mask of their own, and why.
    retained: Retained | None
        After :meth:`mask` with contiguous masks: the sum of the scores that they keep, and that constrained and
        unconstrained masks of the same sizes would keep, for every space and in total. ``print`` shows a table.
    laid_out: tuple[LaidOut, ...]
        After :meth:`mask` with contiguous masks: the orders and intervals themselves.

    Raises
    ------
    InputError
        for an unknown ``side`` or ``method``, contiguous masks on the output side, or example inputs that the
        model does not accept.
    CaptureError
        for constrained or contiguous masks, where ``torch.export`` cannot capture the model.
    UnsupportedModelError
        for a ScriptModule, or where a layer's weight is computed by ``torch.nn.utils.prune`` or a
        parametrisation.
    """

    def __init__(
        self,
        model: nn.Module,
        side: Side = "input",
        method: Method = "unconstrained",
        is_global: bool = False,
        example_inputs: Any = None,
    ) -> None:
        self._model = checked_model(model)
        self._side: Side = one_of("side", side, ("input", "output"))
        self._method = one_of("method", method, get_args(Method))
        if method == "contiguous" and side == "output":
            raise InputError(
                "contiguous masks are a choice of what layers read: use side='input', or method='unconstrained' or "
                "'constrained' for side='output'"
            )
        if not isinstance(is_global, bool):
            raise InputError(f"is_global must be True or False, not {is_global!r}")
        self._is_global = is_global
        self._layers = _find_layers(self._model)
        self._norms = {n: m for n, m in self._model.named_modules() if isinstance(m, _BATCH_NORMS) and m.affine}
        self.skipped: dict[str, str] = {}
        self.masked: dict[str, Tensor] = {}
        self.retained: Retained | None = None
        self.laid_out: tuple[LaidOut, ...] = ()
        self._reading: Reading | None = None  # who reads what, for contiguous masks
        self._scores: dict[str, Tensor] | None = None
        self._example, self._seen = self._look(example_inputs)
        self._protected = self._find_protected()
        methods = {
            "unconstrained": self._unconstrained,
            "constrained": self._constrained,
            "contiguous": self._contiguous,
        }
        self._groups = methods[self._method]()
        for name in {name for group in self._groups for name in group.members}:
            _refuse_computed(name, self._layers[name], ("weight", "bias") if self._side == "output" else ("weight",))

    def importance(self, heuristic: Heuristic = "l2") -> MaskingManager:
        """Score every channel; the lowest scores are masked first. Returns ``self``.

        ``heuristic``: a name (``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``, ``"random"``, in any
        case); an object of :mod:`upscale.importance`, such as ``upscale.HRank(batches)`` for the scores that
        need data; or a function from a layer's weight (detached) to either one score an element, in the weight's
        shape, which are summed over each channel, or one score a channel of the chosen side. Raises
        ``InputError`` for anything else, for data that the model does not accept or that leaves a layer without
        a score, and for scores of the wrong shape; ``NonFiniteError`` where a weight, the data or a score is NaN
        or infinite. The model is as it was before, and so are earlier scores where this fails.
        """
        names = sorted({name for group in self._groups for name in group.members})
        layers = {name: self._layers[name] for name in names}
        norms = {name: tuple(self._norms[norm] for norm in self._norms_after(name)) for name in names}
        subject = Subject(self._model, self._side, layers, norms, self._example)
        self._scores = channel_scores(heuristic, subject)
        return self

    def mask(self, amount: float = 0.5) -> MaskingManager:
        """Zero the lowest ``floor(amount * channels)`` channels of each layer (of all layers, if
        ``is_global``).

        ``amount``: ``0 <= amount < 1``. No layer ever loses its last channel. Ties go by the order of layers
        and channels. Scores are those of the last call of :meth:`importance` (L2 where it was not called).
        Returns ``self``. Raises ``InputError`` for a bad ``amount`` and ``NothingToPruneError`` where no
        layer can be masked.
        """
        share = checked_amount(amount)
        if not self._groups:
            raise NothingToPruneError(self._explain_empty())
        if self._scores is None:
            self.importance()
        assert self._scores is not None
        scores = [group_scores(group, self._scores) for group in self._groups]
        if self._is_global:
            picked = pick_globally(self._groups, scores, share)
        else:
            picked = [pick([(group, score)], share)[0] for group, score in zip(self._groups, scores, strict=True)]
        if self._reading is not None:
            from .contiguous_masks import choose

            chosen = choose(self._reading, scores, [len(channels) for channels in picked])
            picked, self.retained, self.laid_out = chosen.picked, chosen.retained, chosen.laid_out
        self.masked = self._layer_channels(picked)
        for name, channels in self.masked.items():
            self._zero(name, channels)
        return self

    def _look(self, example_inputs: Any) -> tuple[tuple[tuple[Any, ...], dict[str, Any]] | None, Observation | None]:
        """Run the model once on the given inputs, or on guessed images: (the inputs, what was seen)."""
        if example_inputs is not None:
            args, kwargs = as_call(example_inputs)
            try:
                return (args, kwargs), observe(self._model, args, kwargs, self._layers, self._norms)
            except Exception as error:
                raise InputError(f"the model does not accept the example inputs: {error}") from error
        for args in guessed_inputs(self._layers):
            try:
                return (args, {}), observe(self._model, args, {}, self._layers, self._norms)
            except Exception:  # a guess that does not fit may fail in any way
                continue
        return None, None

    def _find_protected(self) -> dict[str, str]:
        """Layers that this side's masks must leave alone, with the reason."""
        if not self._layers:
            return {}
        if self._seen is not None and self._seen.executed:
            if self._side == "input":
                return dict.fromkeys(self._seen.input_readers, "reads a model input")
            return dict.fromkeys(self._seen.output_writers, "writes a model output")
        names = list(self._layers)
        if self._side == "input":
            return {names[0]: "taken for the reader of the model input (registered first)"}
        return {names[-1]: "taken for the writer of the model output (registered last)"}

    def _unconstrained(self) -> list[Group]:
        """Every layer on its own, but layers that share a batch norm together: it has one weight for all."""
        groups = []
        for cluster in self._clusters():
            for name in cluster:
                reason = self._protected.get(name) or self._why_alone(name)
                if reason:
                    self.skipped[name] = reason
            if not any(name in self.skipped for name in cluster):
                size = channel_count(self._layers[cluster[0]], self._side)
                groups.append(Group({name: torch.arange(size) for name in cluster}, size))
        return groups

    def _clusters(self) -> list[list[str]]:
        if self._side == "input":
            return [[name] for name in self._layers]
        clusters: list[list[str]] = []
        home: dict[str, list[str]] = {}  # batch norm -> the cluster that it belongs to
        for name in self._layers:
            norms = self._norms_after(name)
            cluster = next((home[norm] for norm in norms if norm in home), None)
            if cluster is None:
                cluster = []
                clusters.append(cluster)
            cluster.append(name)
            home.update(dict.fromkeys(norms, cluster))
        return clusters

    def _why_alone(self, name: str) -> str | None:
        layer = self._layers[name]
        if self._side == "input" and getattr(layer, "groups", 1) > 1:
            return "grouped convolution: its groups could no longer be of one size"
        if channel_count(layer, self._side) < 2:
            return "has a single channel"
        if self._seen is not None and self._seen.executed and name not in self._seen.executed:
            return "is not used by the forward pass"
        return None

    def _constrained(self) -> list[Group]:
        """The groups that the model's graph ties together, but for those with a protected layer in them."""
        from .segments import segments  # the whole front end, loaded where a graph is needed

        groups = []
        for group in tied_groups(segments(self._model, *self._graph_inputs()), self._side, self._layers):
            guarded = next((name for name in group.members if name in self._protected), None)
            if guarded is None:
                groups.append(group)
            else:
                reason = f"on one tensor with {guarded}, which {self._protected[guarded]}"
                self.skipped.update(dict.fromkeys(group.members, reason))
        return groups

    def _contiguous(self) -> list[Group]:
        """A group for every layer whose mask is free, as the model's graph shows it."""
        from .contiguous_masks import groups_of, read_spaces

        args, kwargs = self._graph_inputs()
        reasons = {name: self._protected.get(name) or self._why_alone(name) for name in self._layers}
        alone = {name: reason for name, reason in reasons.items() if reason}
        self._reading = read_spaces(self._model, args, kwargs, self._layers, alone)
        groups = groups_of(self._reading)
        found = {name for group in groups for name in group.members}
        unseen = dict.fromkeys(self._layers, "reads no channels that the graph can follow")
        self.skipped = {n: r for n, r in {**unseen, **self._reading.skipped}.items() if n not in found}
        return groups

    def _graph_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._example is None:
            raise InputError(
                f"{self._method} masks need the model's graph, and no image of "
                f"{', '.join(map(str, IMAGE_SIZES))} pixels could be run through it: give example_inputs="
            )
        return self._example

    def _layer_channels(self, picked: Iterable[list[int]]) -> dict[str, Tensor]:
        """The picked channels of each group, as indices into each layer that has them."""
        found: dict[str, list[Tensor]] = {}
        for group, channels in zip(self._groups, picked, strict=True):
            for name, index in group.members.items():
                places = index[channels].flatten()
                found.setdefault(name, []).append(places[places >= 0])
        masked = {name: torch.cat(parts).unique() for name, parts in found.items()}
        return {name: channels for name, channels in masked.items() if len(channels)}

    def _zero(self, name: str, channels: Tensor) -> None:
        """Write the zeros, on the parameters' own storage."""
        layer = self._layers[name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        chosen = torch.zeros(channel_count(layer, self._side), dtype=torch.bool, device=weight.device)
        chosen[channels.to(weight.device)] = True
        with torch.no_grad():
            weight.masked_fill_(entries_of(layer, self._side, chosen), 0)
            if self._side == "output":
                rows = [layer.bias]
                for norm in map(self._norms.__getitem__, self._norms_after(name)):
                    rows += [norm.weight, norm.bias]
                for row in rows:
                    if isinstance(row, Tensor):
                        row.masked_fill_(chosen.to(row.device), 0)

    def _norms_after(self, name: str) -> list[str]:
        """Batch norms that read the layer's result and nothing else does in between."""
        size = channel_count(self._layers[name], "output")
        if self._seen is not None and name in self._seen.executed:
            norms: Iterable[str] = sorted(self._seen.norms.get(name, ()))
        else:
            norms = self._registered_next(name)
        return [norm for norm in norms if self._norms[norm].num_features == size]

    def _registered_next(self, name: str) -> list[str]:
        leaves = [n for n, m in self._model.named_modules() if not any(True for _ in m.children())]
        after = leaves[leaves.index(name) + 1 :][:1] if name in leaves else []
        return [n for n in after if n in self._norms]

    def _explain_empty(self) -> str:
        if not self._layers:
            return "the model has no convolution, transposed convolution or linear layer to mask"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
        return f"no layer can be masked on the {self._side} side ({reasons or 'no layers share a tensor'})"


def _find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Maskable layers by path, each weight once, in order of registration."""
    within_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    layers: dict[str, nn.Module] = {}
    weights: set[int] = set()
    for name, module in model.named_modules():
        if not is_layer(module) or id(module) in within_attention:
            continue
        weight = module._parameters.get("weight")  # not module.weight: it may be computed, with side effects
        if isinstance(weight, nn.UninitializedParameter):
            raise InputError(f"{name}: a lazy layer has no weight yet; run the model once first")
        key = id(module if weight is None else weight)
        if key not in weights:
            weights.add(key)
            layers[name] = module
    return layers


def _refuse_computed(name: str, layer: nn.Module, slots: Iterable[str]) -> None:
    """A weight that is computed anew at every call cannot be zeroed in place."""
    for slot in slots:
        if slot in layer._parameters:
            continue
        advice = "torch.nn.utils.prune.remove"
        if parametrize.is_parametrized(layer, slot):
            advice = "torch.nn.utils.parametrize.remove_parametrizations"
        raise UnsupportedModelError(
            f"{name}.{slot} is not a parameter but computed from others (a parametrisation, "
            f"torch.nn.utils.prune, weight norm), so zeros written to it would be lost. Make it one "
            f"first, for instance with {advice}."
        )

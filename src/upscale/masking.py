"""Choose channels by importance and zero them: the masks that ``upscale.export`` then turns into speed.

*Unconstrained* masks let every layer choose its own channels. *Constrained* masks make all layers on a shared
tensor choose the same ones, as classical structured pruning does: no copies afterwards, but less freedom and
so less accuracy. *Contiguous* masks are between the two: every layer chooses its own channels, but only so
that all of them can read a contiguous slice of one common order. Nothing is copied either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .amounts import HALF, Amount, Ignored, Request, Schedule, checked_request, group_shares, ignored_layers
from .channels import Side, channel_count
from .choosing import Chooser, remembered
from .errors import InputError, NothingToPruneError
from .importance import Heuristic, Subject, channel_scores, find_importance
from .mask_arguments import IMAGE_SIZES, as_call, checked_model, guessed_inputs, one_of
from .mask_groups import FINDERS, Search, find_layers
from .mask_objects import Masks
from .observe import Observation, observe
from .ranking import group_scores
from .temporary import fold, held, put_on
from .zeroing import Zeros, refuse_computed, refuse_regrowth, write, zeros_of

if TYPE_CHECKING:
    from .contiguous_masks import LaidOut
    from .retained import Retained
    from .segment_objects import Segment

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
        what one layer writes (in several steps, this holds for the first). Of a flattened tensor whole channels are
        masked, not single pixels.
    is_global:
        Rank all layers' channels together (each layer's scores divided by their root mean square, so that
        layers of different scale compare, but for LAMP's and OBS's, which do by themselves) instead of taking
        the same share of each layer. In a budget, OBS's scores are divided by what a channel costs.
    example_inputs:
        What the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword
        arguments. Needed to see which layers read a model input, which write an output and which batch norm
        follows which layer. Without it, images of 224, 64 and 32 pixels are tried; where none fits,
        unconstrained masks go by the order in which the layers are registered, and the other two methods
        raise ``InputError``.
    ignore:
        Layers to leave alone: names, patterns as in ``fnmatch``, names of modules that layers are in, or modules. On a
        shared tensor constrained masks leave all its layers alone.

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
        ignore: Ignored = (),
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
        self._layers = find_layers(self._model)
        self._norms = {n: m for n, m in self._model.named_modules() if isinstance(m, _BATCH_NORMS) and m.affine}
        self.masked: dict[str, Tensor] = {}
        self.retained: Retained | None = None
        self.laid_out: tuple[LaidOut, ...] = ()
        self._earlier: tuple[LaidOut, ...] = ()  # of the last step, while masks are chosen in several
        self._scores: dict[str, Tensor] | None = None
        self._rescaled, self._by_price = True, False
        self._example, self._seen = self._look(example_inputs)
        self._score_again: Callable[[], object] = self.importance
        self._protected = self._find_protected()
        self._protected |= dict.fromkeys(ignored_layers(ignore, self._model, self._layers), "is to be left alone")
        found = FINDERS[self._method](
            Search(self._model, self._layers, self._side, self._protected, self._seen, self._norms_after),
            self._graph_inputs,
        )
        self._groups, self._reading = found.groups, found.reading
        self.skipped = found.skipped
        for name in {name for group in self._groups for name in group.members}:
            refuse_computed(name, self._layers[name], ("weight", "bias") if self._side == "output" else ("weight",))

    @remembered
    def importance(self, heuristic: Heuristic = "l2") -> MaskingManager:
        """Score every channel; the lowest scores are masked first. Returns ``self``.

        ``heuristic``: a name (``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``, ``"random"``, in any
        case); an object of :mod:`upscale.importance`, such as ``upscale.HRank(batches)`` for the scores that
        need data; an importance of Torch-Pruning, such as ``torch_pruning.importance.TaylorImportance()``; or a
        function from a layer's weight (detached) to either one score an element, in the weight's
        shape, which are summed over each channel, or one score a channel of the chosen side. Raises
        ``InputError`` for anything else, for data that the model does not accept or that leaves a layer without
        a score, and for scores of the wrong shape; ``NonFiniteError`` where a weight, the data or a score is NaN
        or infinite. The model is as it was before, and so are earlier scores where this fails.
        """
        names = sorted({name for group in self._groups for name in group.members})
        layers = {name: self._layers[name] for name in names}
        norms = {name: tuple(self._norms[norm] for norm in self._norms_after(name)) for name in names}
        tied = tuple(self._groups) if self._method == "constrained" else ()
        subject = Subject(self._model, self._side, layers, norms, self._example, tied)
        importance = find_importance(heuristic)
        self._scores = channel_scores(importance, subject)
        self._rescaled = not getattr(importance, "compares_layers", False)
        self._by_price = getattr(importance, "measures_error", False)
        return self

    def mask(
        self,
        amount: Amount = HALF,
        *,
        flops: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        ignore: Ignored = (),
        steps: int = 1,
        schedule: Schedule = "geometric",
        permanent: bool = True,
    ) -> MaskingManager:
        """Zero the channels with the lowest scores: a share of them, or as many as a budget asks for.

        Scores are those of the last call of :meth:`importance` (L2 where it was not called). Ties go by the order of
        layers and channels. No layer ever loses its last channel. Returns ``self``.

        Args:
            amount: ``floor(amount * channels)`` channels of each layer go (of all layers, if ``is_global``; of layers
                that are masked together, if constrained); ``0 <= amount < 1``, 0.5 where nothing is said. Or a dict
                from names to amounts: a key names a layer, all layers in a module, or those that a pattern matches
                (``"layer4.*"``, as in ``fnmatch``). Later keys win, and a layer that none matches loses nothing.
            flops, params, latency: what an export with the example inputs is to have left of the original, for
                instance 0.5. FLOPs are counted as :func:`upscale.measure.flops` does, parameters as the report does,
                both within 1 % of the budget; latency is measured, within 10 %. Every layer loses the same share, or,
                if ``is_global``, scores decide.
            ignore: layers that this call leaves alone; see the class.
            steps: reach the amount or budget in so many steps, and compute the scores again between them, on the
                weights masked so far. A channel that is masked stays masked.
            schedule: ``"geometric"`` (every step keeps the same share of what is there) or ``"linear"``.
            permanent: True writes the zeros into the weights. False puts masks on them as parametrisations
                (``torch.nn.utils.parametrize``): zeros then survive training, and :meth:`make_permanent` writes them.
                Such masks take the place of earlier ones.

        Raises:
            InputError: a bad argument, or a name that matches no layer. BudgetError: a budget that cannot be met (the
                message says the nearest that can). NothingToPruneError: no layer can be masked. CaptureError: for
                budgets, where ``torch.export`` cannot capture the model. The model is unchanged in every case.
        """
        request = checked_request(amount, flops, params, latency, steps, schedule)
        ignored = ignored_layers(ignore, self._model, self._layers)
        if not self._groups:
            raise NothingToPruneError(self._explain_empty())
        asked = 1.0 if request.amount is None else request.amount
        parts = group_shares(asked, self._groups, self._layers, ignored, self.skipped)
        if ignored and not any(parts):
            raise NothingToPruneError("every layer that could be masked is ignored or has an amount of 0")
        before = self._scores, self.retained, self.laid_out
        with held(self._model, self._touched if steps > 1 else list):
            try:
                masked = self._layer_channels(self._choose(request, parts))
            except BaseException:
                self._scores, self.retained, self.laid_out = before
                raise
            self._scores = before[0] or self._scores
            self._put(masked, permanent)
        return self

    def _put(self, masked: dict[str, Tensor], permanent: bool) -> None:
        """Apply masks to the weights, which hold none of :mod:`upscale.temporary` now."""
        zeros = self._zeros(masked)
        if permanent:
            write(zeros)
        else:
            put_on(self._model, zeros)
        self.masked = masked

    def _set(self, chosen: dict[str, Tensor]) -> None:
        """Masks by hand: for some layers, the channels that are masked from now on."""
        with held(self._model, list) as lifted:
            if not lifted:
                refuse_regrowth(self._layers, self._side, self.masked, chosen)
            masked = {name: channels for name, channels in {**self.masked, **chosen}.items() if len(channels)}
            self._put(masked, permanent=not lifted)
        self.retained, self.laid_out = None, ()

    @property
    def masks(self) -> Masks:
        """The masks by layer, to look at, to save and to set by hand: see :class:`upscale.mask_objects.Masks`."""
        names = [n for n in self._layers if any(n in group.members for group in self._groups)]
        sizes = {name: channel_count(self._layers[name], self._side) for name in names}
        return Masks(self._side, sizes, self.masked, self.skipped, self._set)

    def segments(self) -> list[Segment]:
        """The channels that layers share: what constrained masks choose together, for masks of one's own.

        A segment has ``layers``, each with its name, side, module, and where it has the segment's channels. Channels
        that something reads which needs all of them (a model output, an operator that is not known) are in none.
        Raises ``InputError`` where no example inputs are known, ``CaptureError`` where the model cannot be captured.
        """
        from .segment_objects import find_segments  # the whole front end, loaded where a graph is needed

        args, kwargs = self._graph_inputs()
        return find_segments(self._model, args, kwargs, self._layers)

    def make_permanent(self) -> MaskingManager:
        """Write the zeros of ``mask(permanent=False)`` into the weights, and take the parametrisations off."""
        fold(self._model)
        return self

    def _choose(self, request: Request, parts: list[float]) -> list[list[int]]:
        """The masked channels of each group; weights hold the zeros of all steps but the last afterwards."""
        costs = None
        if request.budget is not None:
            from .budget import Costs

            costs = Costs(self._model, *self._graph_inputs(), self._side)
        chooser = Chooser(
            request,
            self._groups,
            parts,
            self._is_global,
            self._rescaled,
            self._by_price,
            self._arranged,
            self._picked_zeros,
            costs,
        )
        picked: list[list[int]] = [[] for _ in self._groups]
        self._earlier = ()
        if self._scores is None:
            self.importance()
        for part in request.parts():
            if any(picked):
                write(self._picked_zeros(picked))
                self._score_again()
                self._earlier = self.laid_out
            assert self._scores is not None
            scores = [group_scores(group, self._scores) for group in self._groups]
            picked = chooser.pick(scores, part, picked)
        return picked

    def _arranged(self, scores: Sequence[Tensor], picked: list[list[int]]) -> list[list[int]]:
        """The masks themselves, where they are more than the lowest channels."""
        if self._reading is None:
            return picked
        from .contiguous_masks import choose

        chosen = choose(self._reading, scores, [len(channels) for channels in picked], self._earlier)
        self.retained, self.laid_out = chosen.retained, chosen.laid_out
        return chosen.picked

    def _picked_zeros(self, picked: Iterable[list[int]]) -> list[Zeros]:
        return self._zeros(self._layer_channels(picked))

    def _touched(self) -> list[Tensor]:
        """All parameters that masks may be written to."""
        every = {name: torch.arange(0) for group in self._groups for name in group.members}
        return list({id(entry.tensor): entry.tensor for entry in self._zeros(every)}.values())

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

    def _graph_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._example is None:
            raise InputError(
                "a budget, segments, and constrained or contiguous masks need the model's graph, and no image of "
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

    def _zeros(self, masked: Mapping[str, Tensor]) -> list[Zeros]:
        """What the masks of these layers zero."""
        return [
            entry
            for name, channels in masked.items()
            for entry in zeros_of(
                self._layers[name], self._side, channels, [self._norms[norm] for norm in self._norms_after(name)]
            )
        ]

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

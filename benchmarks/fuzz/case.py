"""One masked model, its exports, and everything that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import upscale
from upscale.capture import capture
from upscale.exporting import compile_program, finish

from .. import ROOT  # noqa: F401 - puts the tests' folder on the path, for the last import
from .build import Reject, make_inputs
from .extras import ordinary, unguarded
from .graph import Graph, Zero
from .source import instance, mask
from .targets import target_of
from .verdict import Verdict, mark_of, text_of

from support.oracle import fingerprint, leaves, parameter_count, relative_error  # isort: skip

TOLERANCE = 1e-10


class Case:
    """One masked model and its exports."""

    thorough = True  # also the checks that need an export each, for some seeds

    def __init__(self, graph: Graph, source: str) -> None:
        self.graph, self.source = graph, source
        self.model = self.fresh()
        self.example = make_inputs(graph.inputs, graph.batch, graph.seed + 100)
        self.other = make_inputs(graph.inputs, graph.other, graph.seed + 101)
        try:  # a batch norm that wants two values per channel does not run on one
            self.model(*copied(self.example))
            self.model(*copied(self.other))
        except Exception as error:
            raise Reject(str(error)) from error

    def fresh(self) -> nn.Module:
        """The masked model once more."""
        return instance(self.source, self.graph.seed, self.graph.zeros)

    def examine(self) -> Verdict:
        """The verdict."""
        before = fingerprint(self.model)
        smaller = False
        notes: tuple[str, ...] = ()
        for reads in self.graph.reads:
            try:
                pruned = self._export(self.model, reads)
            except Exception as error:
                return self._raised(error, reads)
            finally:
                changed = fingerprint(self.model) != before
            if changed:
                return Verdict("model changed", "", _difference(before, fingerprint(self.model)))
            notes = pruned.report.notes  # type: ignore[union-attr,assignment]
            fault = self._compare(pruned, reads, notes)
            if fault is not None:
                return fault
            sizes = parameter_count(self.model), parameter_count(pruned)
            folded = any(" is computed from " in note for note in notes)  # and stored beside what it was computed from
            if sizes[1] > sizes[0] and not folded:
                return Verdict("more parameters", "", f"reads={reads}: {sizes[0]} parameters became {sizes[1]}", notes)
            smaller = smaller or sizes[1] < sizes[0]
            fault = self._others(pruned, reads, notes)
            if fault is not None:
                return fault
        return Verdict("smaller" if smaller else "same size", notes=notes)

    def _others(self, pruned: nn.Module, reads: str, notes: tuple[str, ...]) -> Verdict | None:
        """What else can be wrong; the dearer checks for some seeds only."""
        fault = unguarded(self.graph, self.model, pruned, self._differ)
        if fault:
            return None if self._unstable() else Verdict("wrong", "at another size", fault, notes)
        if not self.thorough:
            return None
        if self.graph.seed % 8 == 1:
            fault = ordinary(self.model, pruned, self.example, self._differ)
            if fault:
                return None if self._unstable() else Verdict("not ordinary", fault.split(":")[0], fault, notes)
        if self.graph.seed % 8 == 2:
            model = self.fresh()
            same = self._export(model, reads, inplace=True) is model
            fault = self._differ(self.model, model, self.example) if same else "another object is returned"
            if fault:
                return None if self._unstable() else Verdict("not ordinary", "in place", f"in place: {fault}", notes)
        if self.graph.seed % 8 == 0:
            try:
                self._export(self.fresh(), reads, verify=True)
            except upscale.VerificationError as error:
                return None if self._unstable() else Verdict("false alarm", "", str(error), notes)
            except Exception as error:
                return Verdict("exception", f"verification: {mark_of(error)}", text_of(error), notes)
        return None

    def _differ(self, one: nn.Module, two: nn.Module, inputs: Sequence[torch.Tensor]) -> str:
        """How two modules differ on the same inputs; "" if they do not."""
        try:
            error = relative_error(one(*copied(inputs)), two(*copied(inputs)))
        except AssertionError as difference:
            return str(difference)
        return f"relative error {error:.2e}" if error > TOLERANCE else ""

    def _export(self, model: nn.Module, reads: str, **options: Any) -> nn.Module:
        shapes = "spatial" if self.graph.spatial else None
        options = {"verify": False, "dynamic_shapes": shapes, "target": target_of(self.graph.seed), **options}
        return upscale.export(model, tuple(copied(self.example)), reads=reads, **options)  # type: ignore[arg-type]

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _compare(self, pruned: nn.Module, reads: str, notes: tuple[str, ...]) -> Verdict | None:
        """None, or what is wrong with the numbers."""
        fixed = any("batch size specialised" in note for note in notes)
        for inputs in (self.example,) if fixed else (self.example, self.other):
            try:
                expected = self.model(*copied(inputs))
                actual = pruned(*copied(inputs))
            except Exception as error:
                mark = mark_of(error)
                if "was captured with size" in str(error) and self._torch_fixes_batch():
                    return Verdict("batch fixed by torch", notes=notes)
                return Verdict("exception", f"emitted: {mark}", f"the exported model fails: {text_of(error)}", notes)
            try:
                error_ = relative_error(expected, actual)
                what = f"relative error {error_:.2e}"
            except AssertionError as difference:
                error_, what = float("inf"), str(difference)
            if error_ > TOLERANCE:
                if self._unstable():
                    return Verdict("unstable", detail=what)
                return self._wrong(f"reads={reads}, batch {len(inputs[0])}: {what}", reads, notes)
        return None

    def _wrong(self, what: str, reads: str, notes: tuple[str, ...]) -> Verdict:
        try:
            self._export(self.fresh(), reads, verify=True)
        except upscale.VerificationError as error:
            place = str(error).split("The first result that differs is that of ")[-1].split(" (")[0]
            return Verdict("wrong", "", f"{what}; verification sees it: {place}", notes)
        except Exception as error:
            return Verdict("wrong", "", f"{what}; verification fails: {text_of(error)}", notes)
        return Verdict("wrong, verified", "", f"{what}; verification does NOT see it", notes)

    def _unstable(self) -> bool:
        """Whether rounding alone changes the masked model's outputs by more than is allowed: nothing can be said."""
        inputs = self.other
        expected = self.model(*copied(inputs))
        for trial in range(6):
            model = self.fresh()
            generator = torch.Generator().manual_seed(trial)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * (parameter.abs() + 0.1) * 1e-15)
            try:
                if relative_error(expected, model(*copied(inputs))) > TOLERANCE / 2:
                    return True
            except AssertionError:
                return True
        return False

    # -- exceptions ---------------------------------------------------------------------------------------------------

    def _raised(self, error: Exception, reads: str) -> Verdict:
        """Refusals that are justified, and everything else."""
        if isinstance(error, upscale.NothingToPruneError):
            removable = self._removable()
            if not removable:
                return Verdict("nothing to prune")
            return Verdict("refused", "NothingToPruneError", f"nothing to prune, yet {removable}: {text_of(error)}")
        if isinstance(error, upscale.ConstantOutputError):
            if not self._varies():
                return Verdict("constant output")
            return Verdict("refused", "ConstantOutputError", f"the output does vary: {text_of(error)}")
        if isinstance(error, upscale.NonFiniteError) and not self._finite():
            return Verdict("not finite")
        if isinstance(error, upscale.CaptureError) and "depends on values" in str(error):
            return Verdict("depends on values", detail=text_of(error))
        if isinstance(error, upscale.CaptureError) and not self._torch_exports():
            return Verdict("torch cannot export", detail=text_of(error))
        outcome = "refused" if isinstance(error, upscale.UpscaleError) else "exception"
        return Verdict(outcome, mark_of(error), f"reads={reads}: {text_of(error)}")

    def _finite(self) -> bool:
        """Whether the masked model computes numbers: a weight norm of a zero filter gives none."""
        output = self.model(*copied(self.example))
        return all(bool(t.isfinite().all()) for _, t in leaves(output) if isinstance(t, torch.Tensor))

    def _torch_exported(self) -> nn.Module:
        shapes = tuple({0: torch.export.Dim.AUTO} for _ in self.example)
        example = tuple(copied(self.example if self.graph.batch > 1 else self.other))
        return torch.export.export(self.fresh(), example, dynamic_shapes=shapes, strict=False).module()

    def _torch_exports(self) -> bool:
        try:
            self._torch_exported()
        except Exception:
            return False
        return True

    def _torch_fixes_batch(self) -> bool:
        """Whether ``torch.export`` on its own takes no other batch size either."""
        model = self._torch_exported()
        try:
            for batch in (2, 3, 5):
                model(*make_inputs(self.graph.inputs, batch, 0))
        except Exception:
            return True
        return False

    def _varies(self) -> bool:
        """Whether any output depends on any input."""
        first = self.model(*copied(self.other))
        for trial in range(4):
            inputs = make_inputs(self.graph.inputs, self.graph.other, self.graph.seed + 200 + trial)
            inputs = [x * 10.0**trial if x.is_floating_point() else x for x in inputs]
            try:
                if relative_error(first, self.model(*inputs)) > 1e-9:
                    return True
            except AssertionError:
                return True
        return False

    def _removable(self) -> str:
        """A zero input channel that can surely be removed: of an ungrouped layer that does not read a model input."""
        given = {x.untyped_storage().data_ptr() for x in self.example}
        found: list[str] = []

        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            weight, kind = module.weight, type(module).__name__
            if args[0].untyped_storage().data_ptr() in given or getattr(module, "groups", 1) > 1:
                return
            dim = 0 if "Transpose" in kind else 1
            if bool((weight.transpose(0, dim).flatten(1) == 0).all(1).any()):  # type: ignore[operator,union-attr]
                found.append(kind)

        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        handles = [m.register_forward_pre_hook(note) for m in self.model.modules() if isinstance(m, kinds)]
        self.model(*self.example)
        for handle in handles:
            handle.remove()
        return f"{found[0]} has a zero input channel" if found else ""


class CapturedCase(Case):
    """The same network with many masks: captured once, compiled for each. Only what the capture did not fold can be
    masked: a weight computed from others keeps the values that it had."""

    thorough = False

    def __init__(self, graph: Graph, source: str) -> None:
        super().__init__(replace(graph, zeros=()), source)
        self.program = capture(self.model, tuple(copied(self.example)))
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        held = {tensor.data_ptr() for tensor in self.program.tensors.values()}
        self.saved = {name: (tensor, tensor.clone()) for name, tensor in named}
        self.fixed = {name for name, tensor in named if tensor.data_ptr() not in held}

    def masked(self, zeros: tuple[Zero, ...], reads: str) -> Verdict | None:
        """The verdict on another mask; None where the mask changes something that is folded."""
        if any(zero.name in self.fixed for zero in zeros):
            return None
        for tensor, value in self.saved.values():
            tensor.copy_(value)
        mask(self.model, zeros)
        self.graph = replace(self.graph, zeros=zeros, reads=(reads,))
        return self.examine()

    def _export(self, model: nn.Module, reads: str, **options: Any) -> nn.Module:
        if options:  # asked to verify, after a failure
            return super()._export(model, reads, **options)
        target = target_of(self.graph.seed)
        return finish(compile_program(self.program, reads, target=target), "Net", False)  # type: ignore[arg-type]


def copied(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Clones: a network may write into what it is given."""
    return [x.clone() for x in inputs]


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return "changed: " + ", ".join(key for key in before if before[key] != after[key])

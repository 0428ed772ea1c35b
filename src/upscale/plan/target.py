"""What an export is planned for: the setting that decides which way of reading is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError
from .rates import Rates

Backend = Literal["eager", "compile", "cudagraphs", "onnxruntime"]
MemoryFormat = Literal["contiguous", "channels_last"]


@dataclass(frozen=True)
class Target:
    """Where the exported model will run. What is None is taken from the example and the model.

    Args:
        batch: examples at a time. A plan for one batch size is right at every other, but perhaps not the fastest. On
            a GPU a small batch that is named here makes a plan of few calls (see ``Rates.issue``).
        memory_format: ``"contiguous"`` (channels first) or ``"channels_last"``; give the model and its inputs in that
            format too.
        backend: ``"eager"``, ``"compile"`` (``torch.compile`` with Inductor), ``"cudagraphs"`` (eager calls, recorded
            once and replayed) or ``"onnxruntime"``.
        device: ``"cpu"`` or ``"cuda"``, where it is not the model's own.
        round_to: keep channel counts at multiples of this, by keeping channels that could go. 1: keep none.
        rates: what steps cost on the device, as :func:`upscale.tune` measures them; None: typical ones.

    Raises:
        InputError: a value that is none of these.
    """

    batch: int | None = None
    memory_format: MemoryFormat | None = None
    backend: Backend = "eager"
    device: str | None = None
    round_to: int = 1
    rates: Rates | None = None

    def __post_init__(self) -> None:
        _check_count("batch", self.batch, optional=True)
        _check_count("round_to", self.round_to)
        _check_one_of("memory_format", self.memory_format, (None, *get_args(MemoryFormat)))
        _check_one_of("backend", self.backend, get_args(Backend))
        _check_one_of("device", self.device, (None, "cpu", "cuda"))
        if self.rates is not None and not isinstance(self.rates, Rates):
            raise InputError(f"Target(rates={self.rates!r}): rates come from upscale.tune(model, args).rates")


def _check_count(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"Target({name}={value!r}): a whole number of at least 1 is needed")


def _check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"Target({name}={value!r}): choose one of {', '.join(map(repr, allowed))}")

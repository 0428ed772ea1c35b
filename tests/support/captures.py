"""Models and checks for the tests of capture and of the round trip."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from upscale.capture import capture
from upscale.program import Program
from upscale.raising import raise_program
from upscale.signature import flatten


def flat(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    leaves: list[Tensor] = []
    flatten(value, leaves, lambda item: isinstance(item, Tensor))
    return leaves


def assert_same(a: Any, b: Any) -> None:
    """Same structure, same numbers."""
    assert type(a) is type(b)
    for left, right in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def check(model: nn.Module, *args: Any, other: tuple[Any, ...] | None = None, **kwargs: Any) -> Program:
    """Capture, run, raise, copy and pickle; everything must agree with the model, also on a second input."""
    model = model.double().eval()
    program = capture(model, args, kwargs)
    assert not [n for n in program.graph.nodes if str(n.target).endswith("_.default") and "aten" in str(n.target)]
    emitted = raise_program(program)
    copies = (emitted, copy.deepcopy(emitted), pickle.loads(pickle.dumps(emitted)))
    for example in (args, other):
        if example is None:
            continue
        with torch.no_grad():
            expected = model(*copy.deepcopy(example), **copy.deepcopy(kwargs))
            for module in copies:
                given = copy.deepcopy(example)
                assert_same(expected, module(*given, **kwargs))
                assert all(torch.equal(a, b) for a, b in zip(flat(given), flat(example), strict=True))
    for module in copies[1:]:
        assert list(module.state_dict()) == list(emitted.state_dict())
    return program


def fingerprint(model: nn.Module) -> str:
    """Hash of state, training flags, attributes' identities and hooks."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(repr((name, module.training, sorted(module.__dict__))).encode())
        kept = {k: id(v) for k, v in module.__dict__.items() if isinstance(v, (Tensor, list, dict))}
        digest.update(repr(sorted(kept.items())).encode())
    return digest.hexdigest()


class Calls(nn.Module):
    """A model of one conv and a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def images(batch: int = 2, size: int = 6, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def pruned_conv() -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, 3)
    prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)
    return conv

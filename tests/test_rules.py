"""Rules that users register: the documented example, and what the table refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upscale
from support.oracle import check_equal, randomise
from upscale import rules

DOCS = Path(__file__).parent.parent / "docs"


def test_the_documented_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "rules.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/rules.md", "exec"), names)
    check_equal(names["model"].double(), names["pruned"].double(), names["x"].double())


def test_without_a_rule_an_unknown_operator_is_a_barrier_with_its_source_line() -> None:
    @torch.library.custom_op("upscale_test::unknown", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @unknown.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(unknown(self.a(x)))))

    model, x = randomise(Net().double().eval(), seed=1), torch.rand(2, 4, dtype=torch.float64)
    with torch.no_grad():
        model.b.weight[:, 1] = 0
        model.c.weight[:, [0, 3]] = 0
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    ((where, operator, reason),) = pruned.report.barriers
    assert operator == "upscale_test.unknown.default" and "no flow rule" in reason
    assert "test_rules.py" in where and "unknown(self.a(x))" in where
    assert pruned.a.out_features == 6  # the barrier keeps what it reads
    assert (pruned.b.out_features, pruned.c.in_features) == (4, 4)


def test_an_autograd_function_needs_no_rule() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(Square.apply(self.a(x)))

    model, x = randomise(Net().double().eval(), seed=2), torch.rand(2, 4, dtype=torch.float64)
    with torch.no_grad():
        model.b.weight[:, [1, 4]] = 0
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    assert pruned.a.out_features == 4 and not pruned.report.barriers


def test_a_wrong_rule_is_caught() -> None:
    """A rule that claims too much: verification names the first layer that differs, and the model stays."""

    @torch.library.custom_op("upscale_test::reversed", mutates_args=())
    def backwards(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1) * 2

    @backwards.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    @upscale.rule(torch.ops.upscale_test.reversed.default)
    def wrong(op: rules.Op) -> rules.Effect:
        return rules.PerChannel(op["x"], 1, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(backwards(self.a(x)))

    model, x = randomise(Net().double().eval(), seed=3), torch.rand(2, 4, dtype=torch.float64)
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    with pytest.raises(upscale.VerificationError, match="backwards"):
        upscale.export(model, (x,))


def test_the_table_refuses_duplicates_and_wrong_keys() -> None:
    def any_rule(op: rules.Op) -> rules.Effect:
        return rules.Pointwise(op.tensors)

    with pytest.raises(upscale.RuleError, match="already has the rule"):
        upscale.rule(torch.ops.aten.linear.default)(any_rule)
    with pytest.raises(upscale.RuleError, match="no operator overload|not an operator overload"):
        upscale.rule(torch.relu)(any_rule)  # type: ignore[arg-type]
    with pytest.raises(upscale.RuleError, match="at least one"):
        upscale.rule()

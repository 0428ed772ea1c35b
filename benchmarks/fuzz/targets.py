"""What an example's plan is made for: settings in which the planner does what it does not for small networks."""

from __future__ import annotations

import upscale

#: As source text, so that a script can show it. Dear copies: layers are left as they were; dear products: streams
#: shrink at any price.
TARGETS = (
    "upscale.Target()",
    "upscale.Target(rates=upscale.plan.Rates(call=1e7, copy=1e3, pick=1e3, piece=1e7, multiply=1e-6, load=0.0))",
    "upscale.Target(rates=upscale.plan.Rates(multiply=1e5, copy=1e3), round_to=4)",
    'upscale.Target(memory_format="channels_last", batch=8, rates=upscale.plan.Rates(multiply=1e5))',
)


def target_text(seed: int) -> str:
    """The source of the target of one seed."""
    return TARGETS[seed // 8 % len(TARGETS)]  # seed % 8 chooses what else is checked


def target_of(seed: int) -> upscale.Target:
    """The target of one seed."""
    target: upscale.Target = eval(target_text(seed), {"upscale": upscale})
    return target

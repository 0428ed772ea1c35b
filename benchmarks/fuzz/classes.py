"""Layers of one's own, as networks define them: subclasses of torch's layers whose ``forward`` does more or else.

They are source text: a network that uses one carries it along.
"""

from __future__ import annotations

CLASSES = {
    "StdConv2d": """
class StdConv2d(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True, unbiased=False) + 1e-2)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)
""",
    "SameConv2d": """
class SameConv2d(nn.Conv2d):
    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1), value=0.3)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
""",
    "HalfLinear": """
class HalfLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5 + 0.25
""",
    "EqualLinear": """
class EqualLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.7, self.bias * 0.3)
""",
    "BareLinear": """
class BareLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)
""",
    "LayerNorm2d": """
class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, 1e-3)
        return x.permute(0, 3, 1, 2)
""",
    "ActNorm2d": """
class ActNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))
""",
    "MaskedConv2d": """
class MaskedConv2d(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("keep", torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.keep, self.bias, self.stride, self.padding)
""",
    "Gain": """
class Gain(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.inner = nn.Linear(channels, channels)

    def forward(self, x, residual=True):
        y = self.inner(x) * self.gamma.exp()
        return x + y if residual else y
""",
}


def needed_by(code: str) -> str:
    """The source of the classes that some code uses."""
    return "".join(f"{text.strip()}\n\n\n" for name, text in CLASSES.items() if f"{name}(" in code)

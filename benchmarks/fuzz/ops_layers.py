"""Operators that make channels from weights: convolutions, linear layers, products with parameters, embeddings."""

from __future__ import annotations

from .build import Frame, T
from .catalogue import divisors, image, op, plane, sequence


def _spatial(b: Frame, x: T) -> tuple[int, str]:
    """Kernel, and the options every convolution has."""
    size = min(x.dims[1:])
    kernel = b.pick("kernel", [k for k in (1, 3, 2, 5) if k <= size])
    stride = b.pick("stride", (1, 1, 1, 2))
    dilation = b.pick("dilation", (1, 1, 1, 2)) if kernel > 1 and size > 4 else 1
    text = f"stride={stride}"
    if dilation > 1:
        text += f", dilation={dilation}"
    padding = b.pick("padding", (0, dilation * (kernel // 2), 1, "same", "valid"))
    if padding == "same" and stride > 1:
        padding = 1
    if isinstance(padding, int) and padding > size - 1:
        padding = 0
    if padding != 0:
        text += f", padding={padding!r}"
        mode = b.pick("mode", ("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        if mode != "zeros" and padding not in ("same", "valid"):
            text += f", padding_mode={mode!r}"
    return kernel, text


def _wrapped(b: Frame, layer: str) -> str:
    """The layer as it is, or reparametrised."""
    wrap = b.pick("wrap", ("", "", "", "", "", "", "weight_norm", "prune", "old_weight_norm", "spectral"))
    if wrap == "spectral":
        return f"nn.utils.parametrizations.spectral_norm({layer})"
    if wrap == "weight_norm":
        return f"nn.utils.parametrizations.weight_norm({layer})"
    if wrap == "old_weight_norm":
        return f"nn.utils.weight_norm({layer})"
    if wrap == "prune":
        return f'nn.utils.prune.identity({layer}, "weight")'
    return layer


@op("conv", 5)
def conv(b: Frame) -> str:
    """A convolution in one, two or three dimensions."""
    x = b.take(accept=image)
    nd = x.rank - 2
    kernel, options = _spatial(b, x)
    bias = "" if not b.flag("no_bias") else ", bias=False"
    layer = _wrapped(b, f"nn.Conv{nd}d({x.dims[0]}, {b.width()}, {kernel}, {options}{bias})")
    return f"{b.module(layer)}({x})"


@op("conv")
def conv_functional(b: Frame) -> str:
    """``F.conv2d`` with free parameters, padding and stride per dimension, the weight perhaps standardised."""
    x = b.take(accept=image)
    nd = x.rank - 2
    kernel = [b.pick(f"k{i}", [k for k in (1, 3, 2) if k <= n]) for i, n in enumerate(x.dims[1:])]
    padding = [b.pick(f"p{i}", (0, 1)) for i in range(nd)]
    out = b.width()
    weight = b.param(out, x.dims[0], *kernel)
    bias = b.param(out) if b.flag("bias") else "None"
    form = b.pick("form", ("plain", "plain", "standardised", "scaled", "half"))
    if form == "standardised":
        dims = tuple(range(1, nd + 2))
        weight = f"({weight} - {weight}.mean({dims}, keepdim=True)) / ({weight}.std({dims}, keepdim=True) + 1e-3)"
    elif form == "scaled":
        weight = f"{weight} * {b.param(out, *[1] * (nd + 1))}"
    elif form == "half":
        weight = f"{weight} * 0.5"
    stride = b.pick("stride", (1, 2))
    return f"F.conv{nd}d({x}, {weight}, {bias}, {stride}, {tuple(padding)})"


@op("grouped conv", 2)
def grouped(b: Frame) -> str:
    """A grouped convolution, input and output widths per group unequal as a rule."""
    x = b.take(accept=lambda t: image(t) and len(divisors(t.dims[0])) > 1)
    groups = b.pick("groups", divisors(x.dims[0])[1:])
    out = groups * b.pick("per_group", (1, 2, 3))
    kernel, options = _spatial(b, x)
    bias = "" if not b.flag("no_bias") else ", bias=False"
    layer = f"nn.Conv{x.rank - 2}d({x.dims[0]}, {out}, {kernel}, {options}, groups={groups}{bias})"
    return f"{b.module(_wrapped(b, layer))}({x})"


@op("depthwise conv", 2)
def depthwise(b: Frame) -> str:
    """A depthwise convolution, with a multiplier at times."""
    x = b.take(accept=lambda t: image(t) and t.dims[0] > 1)
    kernel, options = _spatial(b, x)
    c = x.dims[0]
    out = c * b.pick("multiplier", [m for m in (1, 1, 2, 3) if c * m <= 16])
    bias = "" if not b.flag("no_bias") else ", bias=False"
    return f"{b.module(_wrapped(b, f'nn.Conv{x.rank - 2}d({c}, {out}, {kernel}, {options}, groups={c}{bias})'))}({x})"


@op("transposed conv", 2)
def transposed(b: Frame) -> str:
    """A transposed convolution, grouped at times."""
    x = b.take(accept=lambda t: image(t) and max(t.dims[1:]) <= 10)
    kernel, stride = b.pick("kernel", (1, 2, 3)), b.pick("stride", (1, 2))
    padding = b.pick("padding", (0, 1)) if kernel == 3 else 0
    extra = b.pick("output_padding", (0, 1)) if stride == 2 else 0
    groups = b.pick("groups", (1, 1, *divisors(x.dims[0])))
    out = b.width("out", groups) if groups <= 4 else groups
    options = f"stride={stride}, padding={padding}, output_padding={extra}, groups={groups}"
    bias = "" if not b.flag("no_bias") else ", bias=False"
    return f"{b.module(f'nn.ConvTranspose{x.rank - 2}d({x.dims[0]}, {out}, {kernel}, {options}{bias})')}({x})"


@op("linear", 4)
def linear(b: Frame) -> str:
    """A linear layer on the last dimension."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 5 and t.dims[-1] <= 64)
    bias = "" if not b.flag("no_bias") else ", bias=False"
    return f"{b.module(_wrapped(b, f'nn.Linear({x.dims[-1]}, {b.width()}{bias})'))}({x})"


@op("linear")
def linear_functional(b: Frame) -> str:
    """Linear layers written out: ``F.linear``, ``@``, ``matmul``, ``addmm``, ``bmm``, ``einsum``."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 4 and t.dims[-1] <= 64)
    i, o = x.dims[-1], b.width()
    form = b.pick("form", ("linear", "right", "matmul_t", "einsum", "addmm", "bmm", "left", "addcmul"))
    if form == "linear":
        return f"F.linear({x}, {b.param(o, i)}, {b.param(o)})"
    if form == "right":
        return f"{x} @ {b.param(i, o)} + {b.param(o)}"
    if form == "matmul_t":
        return f"torch.matmul({x}, {b.param(o, i)}.t())"
    if form == "einsum":
        return f'torch.einsum("...i,oi->...o", {x}, {b.param(o, i)})'
    if form == "addmm":
        b.need(x.rank == 2)
        return f"torch.addmm({b.param(o)}, {x}, {b.param(i, o)})"
    if form == "bmm":
        b.need(x.rank == 3)
        return f"torch.bmm({x}, {b.param(1, i, o)}.expand({x}.shape[0], -1, -1))"
    if form == "left":  # mixes the second last dimension
        b.need(x.rank >= 3)
        return f"torch.matmul({b.param(o, x.dims[-2])}, {x})"
    return f"torch.addcmul({b.param(i)}, {x}, {b.param(i)}, value=0.5)"


@op("linear")
def einsum(b: Frame) -> str:
    """Contractions of image channels and of token positions by ``einsum`` and ``tensordot``."""
    x = b.take(accept=lambda t: t.rank in (3, 4))
    c, o = x.dims[0], b.width()
    tail = "yz"[: x.rank - 2]
    form = b.pick("form", ("channels", "mode", "diagonal", "grouped", "tensordot"))
    if form == "channels":
        return f'torch.einsum("nc{tail},oc->no{tail}", {x}, {b.param(o, c)})'
    if form == "mode":
        return f'torch.einsum("nc{tail},co->n{tail}o", {x}, {b.param(c, o)})'
    if form == "diagonal":
        return f'torch.einsum("nc{tail},c->nc{tail}", {x}, {b.param(c)})'
    if form == "tensordot":
        return f"torch.tensordot({x}, {b.param(c, o)}, dims=([1], [0]))"
    groups = b.pick("groups", divisors(c))
    weight = b.param(groups, o, c // groups)
    view = f"{x}.unflatten(1, ({groups}, {c // groups}))"
    return f'torch.einsum("ngc{tail},goc->ngo{tail}", {view}, {weight}).flatten(1, 2)'


@op("bilinear", 0.5)
def bilinear(b: Frame) -> str:
    """``nn.Bilinear`` on a tensor and another of the same leading shape."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 3 and t.dims[-1] <= 12)
    y = b.take("y", lambda t: t.rank == x.rank and t.times == x.times and t.dims[:-1] == x.dims[:-1])
    b.need(y.dims[-1] <= 12)
    return f"{b.module(f'nn.Bilinear({x.dims[-1]}, {y.dims[-1]}, {b.width()})')}({x}, {y})"


@op("embedding", 3)
def embedding(b: Frame) -> str:
    """A table looked up by integers, with positions added at times."""
    x = b.take(accept=lambda t: t.vocabulary > 0 and t.rank <= 3, floating=False)
    out = b.width()
    code = f"{b.module(f'nn.Embedding({x.vocabulary}, {out})')}({x})"
    form = b.pick("form", ("plain", "position", "weight", "arange"))
    if form == "position" and x.rank == 2:
        code = f"{code} + {b.param(1, x.dims[0], out)}"
    elif form == "arange" and x.rank == 2:
        code = f"{code} + {b.module(f'nn.Embedding({x.dims[0]}, {out})')}(torch.arange({x.dims[0]}))"
    elif form == "weight":
        code = f"F.embedding({x}, {b.param(x.vocabulary, out)})"
    return code


@op("embedding", 0.5)
def embedding_bag(b: Frame) -> str:
    """``nn.EmbeddingBag`` of the rows of an id tensor."""
    x = b.take(accept=lambda t: t.vocabulary > 0 and t.rank == 2, floating=False)
    mode = b.pick("form", ("mean", "sum"))
    return f"{b.module(f'nn.EmbeddingBag({x.vocabulary}, {b.width()}, mode={mode!r})')}({x})"


@op("embedding", 0.7)
def positions(b: Frame) -> str:
    """A learned position, class token or register put beside the tokens."""
    x = b.take(accept=sequence)
    n, c = x.dims
    form = b.pick("form", ("add", "token", "token_last", "scale_rows"))
    if form == "add":
        return f"{x} + {b.param(1, n, c)}"
    if form == "scale_rows":
        return f"{x} * {b.param(1, n, 1)}"
    token = f"{b.param(1, 1, c)}.expand({x}.shape[0], -1, -1)"
    return f"torch.cat([{token}, {x}], 1)" if form == "token" else f"torch.cat(({x}, {token}), dim=1)"


@op("linear", 0.7)
def conv_as_linear(b: Frame) -> str:
    """A 1x1 convolution written as a linear layer on channels last, and the other way round."""
    x = b.take(accept=plane)
    c, out = x.dims[0], b.width()
    if b.flag("back"):
        tokens = b.let(f"{x}.flatten(2).transpose(1, 2)")
        return f"{b.module(f'nn.Conv1d({c}, {out}, 1)')}({tokens}.transpose(1, 2)).unflatten(2, {x.dims[1:]})"
    return f"{b.module(f'nn.Linear({c}, {out})')}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"

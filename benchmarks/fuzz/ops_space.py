"""Operators within a channel: pooling, resampling, padding, reductions, transforms."""

from __future__ import annotations

from .build import Frame
from .catalogue import image, op, plane


@op("pooling", 2)
def pool(b: Frame) -> str:
    """Average, max and Lp pooling with their options."""
    x = b.take(accept=lambda t: image(t) and min(t.dims[1:]) >= 2)
    nd = x.rank - 2
    kernel = b.pick("kernel", [k for k in (2, 3) if k <= min(x.dims[1:])])
    stride, padding = b.pick("stride", (1, 2, 3)), b.pick("padding", (0, 1))
    ceil = b.pick("ceil", ("", ", ceil_mode=True"))
    form = b.pick("form", ("avg", "max", "lp", "max_module", "avg_module"))
    if form == "lp":
        b.need(nd <= 2)
        return f"F.lp_pool{nd}d({x}, 2, {kernel}, {stride}{ceil})"
    if form.startswith("max"):
        dilation = b.pick("dilation", ("", ", dilation=2")) if min(x.dims[1:]) > 3 else ""
        if form == "max":
            return f"F.max_pool{nd}d({x}, {kernel}, {stride}, {padding}{dilation}{ceil})"
        return f"{b.module(f'nn.MaxPool{nd}d({kernel}, {stride}, {padding}{dilation}{ceil})')}({x})"
    count = b.pick("count", ("", ", count_include_pad=False"))
    divisor = b.pick("divisor", ("", "", ", divisor_override=3")) if nd > 1 else ""
    if form == "avg":
        return f"F.avg_pool{nd}d({x}, {kernel}, {stride}, {padding}{ceil}{count}{divisor})"
    return f"{b.module(f'nn.AvgPool{nd}d({kernel}, {stride}, {padding}{ceil}{count}{divisor})')}({x})"


@op("pooling")
def adaptive_pool(b: Frame) -> str:
    """Adaptive pooling."""
    x = b.take(accept=image)
    kind, size = b.pick("kind", ("avg", "max")), b.pick("size", (1, 2, 3))
    return f"F.adaptive_{kind}_pool{x.rank - 2}d({x}, {size})"


@op("pooling", 0.5)
def pool_indices(b: Frame) -> str:
    """Max pooling with its indices, undone by unpooling."""
    x = b.take(accept=lambda t: plane(t) and t.dims[1] % 2 == 0 and t.dims[2] % 2 == 0)
    a, i = b.unpack(f"F.max_pool2d({x}, 2, return_indices=True)", 2)
    return f"F.max_unpool2d({a}, {i}, 2)"


@op("upsampling", 1.5)
def upsample(b: Frame) -> str:
    """Interpolation in all its modes, by factor or by size."""
    x = b.take(accept=lambda t: image(t) and max(t.dims[1:]) <= 8)
    nd = x.rank - 2
    smooth = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}[nd]
    mode = b.pick("mode", ("nearest", "nearest-exact", *smooth))
    where = "scale_factor=2" if not b.flag("size") else f"size={tuple(n + 1 for n in x.dims[1:])}"
    align = b.pick("align", ("", ", align_corners=False", ", align_corners=True")) if mode in smooth else ""
    antialias = ", antialias=True" if mode in ("bilinear", "bicubic") and b.flag("antialias") else ""
    return f"F.interpolate({x}, {where}, mode={mode!r}{align}{antialias})"


@op("upsampling", 0.5)
def resample_like(b: Frame) -> str:
    """Resize to the size of another tensor, then join."""
    x = b.take(accept=plane)
    y = b.take("y", lambda t: plane(t) and t.times == x.times)
    mode = b.pick("mode", ('mode="nearest"', 'mode="bilinear", align_corners=False'))
    return f"torch.cat([F.interpolate({x}, size={y}.shape[-2:], {mode}), {y}], 1)"


@op("upsampling", 0.4)
def grid_sample(b: Frame) -> str:
    """Sample at fixed offsets, or at learned ones."""
    x = b.take(accept=plane)
    grid = b.let(f"F.affine_grid({b.param(1, 2, 3)}.expand({x}.shape[0], -1, -1), {x}.shape, align_corners=False)")
    return f"F.grid_sample({x}, {grid}, align_corners=False)"


@op("padding", 1.5)
def pad(b: Frame) -> str:
    """Padding of space or of channels, by a constant or by the tensor itself."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 5)
    mode = b.pick("mode", ("constant", "constant", "reflect", "replicate", "circular"))
    before, after = b.pick("before", (0, 1, 2)), b.pick("after", (1, 0, 2))
    if mode == "constant":
        dims = b.pick("dims", list(range(1, x.rank)))
        value = b.pick("value", ("", ", value=0.4", ", value=-1.0"))
        after = after - 1 if b.flag("crop") else after
        return f"F.pad({x}, {(0, 0) * (dims - 1) + (before, after)}{value})"
    b.need(image(x))
    nd = x.rank - 2
    sizes = (before, after) + (0, 0) * (nd - 1)
    return f"F.pad({x}, {sizes}, mode={mode!r})"


@op("padding", 0.5)
def pad_module(b: Frame) -> str:
    """A padding module in front of a convolution that has none."""
    x = b.take(accept=lambda t: plane(t) and min(t.dims[1:]) > 1)
    kind = b.pick(
        "kind", ("ZeroPad2d(1)", "ConstantPad2d(1, 0.5)", "ReflectionPad2d(1)", "ReplicationPad2d((1, 0, 1, 0))")
    )
    inner = f"{b.module(f'nn.{kind}')}({x})"
    return f"{b.module(f'nn.Conv2d({x.dims[0]}, {b.width()}, 2)')}({inner})"


@op("reductions", 2)
def reduce(b: Frame) -> str:
    """A statistic over space or over channels."""
    x = b.take(accept=lambda t: t.rank >= 3)
    dims = b.pick("dims", ["space", "channels", *range(1, x.rank)])
    chosen = tuple(range(2, x.rank)) if dims == "space" else (1,) if dims == "channels" else (dims,)
    keep = b.pick("keep", ("", ", keepdim=True"))
    form = b.pick("f", ("mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "max", "prod", "median"))
    if form in ("max", "prod", "median"):
        return f"{x}.{form}({chosen[0]}{keep})" + ("[0]" if form != "prod" else "")
    if form == "norm":
        return f"torch.linalg.vector_norm({x}, 2, {chosen}{keep})"
    if form in ("var", "std"):
        return f"({x}.{form}({chosen}, correction={b.pick('correction', (0, 1))}{keep}) + 0.01)"
    return f"{x}.{form}({chosen}{keep})"


@op("reductions")
def centred(b: Frame) -> str:
    """Subtract a mean over space, channels or everything."""
    x = b.take(accept=lambda t: t.rank >= 3)
    dims = b.pick("dims", (tuple(range(2, x.rank)), (1,), tuple(range(1, x.rank))))
    return f"{x} - {x}.mean({dims}, keepdim=True)"


@op("reductions", 0.5)
def global_response(b: Frame) -> str:
    """Global response normalisation of ConvNeXt v2, on channels last."""
    x = b.take(accept=plane)
    c = x.dims[2]
    g = b.let(f"torch.norm({x}, p=2, dim=(1, 2), keepdim=True)")
    n = b.let(f"{g} / ({g}.mean(dim=-1, keepdim=True) + 1e-2)")
    return f"{b.param(1, 1, 1, c)} * ({x} * {n}) + {b.param(1, 1, 1, c)} + {x}"


@op("barriers")
def barrier(b: Frame) -> str:
    """Operators that no rule follows: sorted, cumulative, picked by value."""
    x = b.take()
    dim = b.pick("dim", list(range(1, x.rank)))
    n = x.shape[dim]
    form = b.pick(
        "f",
        ("cumsum", "sort", "topk", "argmax", "cumprod", "cummax", "kthvalue", "diff", "logcumsumexp", "tril", "renorm"),
    )
    if form == "topk":
        return f"{x}.topk({b.pick('k', list(range(1, min(n, 3) + 1)))}, dim={dim})[0]"
    if form == "sort":
        return f"torch.sort({x}, dim={dim}, descending=True)[0]"
    if form == "argmax":
        return f"{x}.argmax({dim}).to({x}.dtype)"
    if form == "cummax":
        return f"{x}.cummax({dim})[0]"
    if form == "kthvalue":
        return f"{x}.kthvalue(1, {dim})[0]"
    if form == "tril":
        b.need(x.rank >= 3)
        return f"torch.tril({x})"
    if form == "renorm":
        return f"{x} / {x}.abs().amax({dim}, keepdim=True).clamp(min=0.5)"
    return f"{x}.{form}(dim={dim})"


@op("barriers", 0.5)
def outer(b: Frame) -> str:
    """Products between activations: Gram matrix, correlation, distances."""
    x = b.take(accept=lambda t: t.rank == 3 and max(t.dims) <= 16)
    form = b.pick("f", ("gram", "einsum", "cdist", "cosine", "covariance"))
    if form == "gram":
        return f"torch.bmm({x}, {x}.transpose(1, 2)) / {x.dims[-1]}"
    if form == "einsum":
        return f'torch.einsum("nic,njc->nij", {x}, torch.tanh({x}))'
    if form == "cdist":
        return f"torch.cdist({x}, {x} + 0.5)"
    if form == "cosine":
        return f"F.cosine_similarity({x}, {x}.roll(1, 1) + 0.3, dim=-1)"
    return f"torch.matmul({x}.transpose(-1, -2), {x}) * 0.2"


@op("fft")
def fft(b: Frame) -> str:
    """Fourier mixing along space or channels."""
    x = b.take(accept=lambda t: t.rank >= 3)
    form = b.pick("f", ("real", "filter", "fnet", "abs"))
    dim = b.pick("dim", list(range(1, x.rank)))
    if form == "real":
        return f"torch.fft.fft({x}, dim={dim}).real"
    if form == "abs":
        return f"torch.fft.rfft({x}, dim={dim}).abs()"
    if form == "fnet":
        return f"torch.fft.fft(torch.fft.fft({x}, dim=-1), dim=-2).real * 0.3"
    n = x.shape[dim]
    shape = [1] * x.rank
    shape[dim] = n // 2 + 1
    return f"torch.fft.irfft(torch.fft.rfft({x}, dim={dim}) * {b.param(*shape)}, n={n}, dim={dim})"


@op("unfold", 0.7)
def unfold(b: Frame) -> str:
    """``F.unfold`` (im2col), folded again at times, and patches by ``Tensor.unfold``."""
    x = b.take(accept=lambda t: plane(t) and min(t.dims[1:]) >= 2 and t.size <= 300)
    form = b.pick("f", ("columns", "patches", "fold"))
    if form == "columns":
        return f"F.unfold({x}, 2, stride=2)"
    if form == "patches":
        return f"{x}.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)"
    return f"F.fold(F.unfold({x}, 2), {x.dims[1:]}, 2) * 0.5"

"""Triton kernels of group normalisation and SiLU on channels-last tensors, with fp32 statistics.

A program has one sample, one chunk of its pixels and one block of channels, so memory is read in
its order. Forward: moments of each channel, moments of each group, output. Backward: sums over the
pixels of each channel, sums of each group, gradient of the input. No sum depends on timing.

With TRITON_INTERPRET=1 in the environment before the import, the kernels run on a CPU.
"""

import triton
import triton.language as tl

CHUNK_PIXELS = tl.constexpr(512)
"""Pixels of a chunk: 16 samples of 64x64 pixels and 320 channels make 640 programs."""
BLOCK_PIXELS = tl.constexpr(32)
BLOCK_CHANNELS = tl.constexpr(64)
"""Channels of a program: of bf16, one cache line."""
BLOCK_CHUNKS = tl.constexpr(16)
"""Chunks that the kernels of a group read at once."""


@triton.jit
def channel_moments(
    x: tl.tensor, partial: tl.tensor, pixels: tl.tensor, channels: tl.tensor
) -> None:
    """Write the mean and the sum of squared deviations of each channel in each chunk.

    x: [B, pixels, channels]; partial: [B, chunks, 2, channels]; grid: (chunks, blocks, B).
    """
    chunk, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = chunk * CHUNK_PIXELS
    end = tl.minimum(first + CHUNK_PIXELS, pixels)
    mean = tl.zeros([BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(first, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixel < end)[:, None] & (channel < channels)[None, :]
        place = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(end - start, BLOCK_PIXELS).to(tl.float32)
        before = (start - first).to(tl.float32)
        tile_mean = tl.sum(values, 0) / count
        apart = tl.where(inside, values - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        # Chan et al. 1983: moments of two sets from those of each, without cancellation
        mean += delta * (count / (before + count))
        squares += tl.sum(apart * apart, 0) + delta * delta * (before * count / (before + count))
    place = ((sample * tl.num_programs(0) + chunk) * 2) * channels + channel
    tl.store(partial + place, mean, mask=channel < channels)
    tl.store(partial + place + channels, squares, mask=channel < channels)


@triton.jit
def group_moments(
    partial: tl.tensor,
    before: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    eps: tl.tensor,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Merge the moments of a group's channels and chunks, with `before` added to each channel.

    before: [B, channels]; mean, rstd: [B, groups]; WIDTH: channels of a group, BLOCK: the next
    power of two; grid: (B, groups).
    """
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    channel = group * WIDTH + lane
    added = tl.zeros([BLOCK], tl.float32)
    if BEFORE:
        own_place = sample * channels + channel
        added = tl.load(before + own_place, mask=lane < WIDTH, other=0.0).to(tl.float32)
    total = 0.0
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & (lane < WIDTH)[None, :]
        count = tl.minimum(pixels - chunk * CHUNK_PIXELS, CHUNK_PIXELS).to(tl.float32)[:, None]
        place = ((sample * chunks + chunk[:, None]) * 2) * channels + channel[None, :]
        means = tl.load(partial + place, mask=inside, other=0.0) + added[None, :]
        total += tl.sum(tl.sum(tl.where(inside, means * count, 0.0), 1), 0)
    centre = total / (WIDTH * pixels)
    squares = 0.0
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & (lane < WIDTH)[None, :]
        count = tl.minimum(pixels - chunk * CHUNK_PIXELS, CHUNK_PIXELS).to(tl.float32)[:, None]
        place = ((sample * chunks + chunk[:, None]) * 2) * channels + channel[None, :]
        apart = tl.load(partial + place, mask=inside, other=0.0) + added[None, :] - centre
        own = tl.load(partial + place + channels, mask=inside, other=0.0)
        squares += tl.sum(tl.sum(tl.where(inside, own + count * apart * apart, 0.0), 1), 0)
    place = sample * tl.num_programs(1) + group
    tl.store(mean + place, centre)
    tl.store(rstd + place, tl.rsqrt(squares / (WIDTH * pixels) + eps))


@triton.jit
def coefficients(
    before: tl.tensor,
    modulation: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return centre, rstd, factor and offset: y = (x − centre) · rstd · factor + offset."""
    real = channel < channels
    place = sample * (channels // WIDTH) + channel // WIDTH
    centre = tl.load(mean + place, mask=real, other=0.0)
    scale = tl.load(rstd + place, mask=real, other=0.0)
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    if BEFORE:
        added = tl.load(before + sample * channels + channel, mask=real, other=0.0)
        centre -= added.to(tl.float32)
    if MODULATED:
        place = sample * 2 * channels + channel
        more = 1.0 + tl.load(modulation + place, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(modulation + place + channels, mask=real, other=0.0).to(tl.float32)
        factor *= more
        offset = offset * more + shift
    return centre, scale, factor, offset


@triton.jit
def output(
    x: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    before: tl.tensor,
    modulation: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Write y = SiLU((x − centre) · rstd · factor + offset); grid: (chunks, blocks, B)."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    centre, scale, factor, offset = coefficients(
        before, modulation, weight, bias, mean, rstd, sample, channel, channels,
        BEFORE, MODULATED, WIDTH,
    )  # fmt: skip
    first = tl.program_id(0) * CHUNK_PIXELS
    end = tl.minimum(first + CHUNK_PIXELS, pixels)
    for start in range(first, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixel < end)[:, None] & (channel < channels)[None, :]
        place = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        values = (values - centre[None, :]) * (scale * factor)[None, :] + offset[None, :]
        if SILU:
            values *= tl.sigmoid(values)
        tl.store(y + place, values, mask=inside)


@triton.jit
def gradient_before_silu(grad: tl.tensor, values: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    """Return the gradient of `values`, from that of SiLU(values)."""
    if SILU:
        gate = tl.sigmoid(values)
        grad *= gate * (1.0 + values * (1.0 - gate))
    return grad


@triton.jit
def channel_sums(
    grad: tl.tensor,
    x: tl.tensor,
    partial: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    before: tl.tensor,
    modulation: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Sum the gradient before SiLU, its product with the normalised x, and the normalised x.

    partial: [B, chunks, 3, channels]; grid: (chunks, blocks, B).
    """
    chunk, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    centre, scale, factor, offset = coefficients(
        before, modulation, weight, bias, mean, rstd, sample, channel, channels,
        BEFORE, MODULATED, WIDTH,
    )  # fmt: skip
    first = chunk * CHUNK_PIXELS
    end = tl.minimum(first + CHUNK_PIXELS, pixels)
    grads = tl.zeros([BLOCK_CHANNELS], tl.float32)
    products = tl.zeros([BLOCK_CHANNELS], tl.float32)
    norms = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(first, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixel < end)[:, None] & (channel < channels)[None, :]
        place = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (values - centre[None, :]) * scale[None, :], 0.0)
        own = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        own = gradient_before_silu(own, normed * factor[None, :] + offset[None, :], SILU)
        grads += tl.sum(own, 0)
        products += tl.sum(own * normed, 0)
        norms += tl.sum(normed, 0)
    place = ((sample * tl.num_programs(0) + chunk) * 3) * channels + channel
    tl.store(partial + place, grads, mask=channel < channels)
    tl.store(partial + place + channels, products, mask=channel < channels)
    tl.store(partial + place + 2 * channels, norms, mask=channel < channels)


@triton.jit
def group_sums(
    partial: tl.tensor,
    sums: tl.tensor,
    means: tl.tensor,
    grad_before: tl.tensor,
    modulation: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    MODULATED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Merge the sums of `channel_sums` over the chunks, and average two of them over each group.

    sums: [2, B, channels]; means: [2, B, groups], of the gradient of the normalised x, and of its
    product with the normalised x; grad_before: [B, channels]; grid: (B, groups).
    """
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    samples, groups = tl.num_programs(0), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    real, channel = lane < WIDTH, group * WIDTH + lane
    grads = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    norms = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & real[None, :]
        place = ((sample * chunks + chunk[:, None]) * 3) * channels + channel[None, :]
        grads += tl.sum(tl.load(partial + place, mask=inside, other=0.0), 0)
        products += tl.sum(tl.load(partial + place + channels, mask=inside, other=0.0), 0)
        norms += tl.sum(tl.load(partial + place + 2 * channels, mask=inside, other=0.0), 0)
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    if MODULATED:
        more = tl.load(modulation + sample * 2 * channels + channel, mask=real, other=0.0)
        factor *= 1.0 + more.to(tl.float32)
    count = WIDTH * pixels
    mean_grad = tl.sum(factor * grads, 0) / count
    mean_product = tl.sum(factor * products, 0) / count
    place = sample * channels + channel
    tl.store(sums + place, grads, mask=real)
    tl.store(sums + samples * channels + place, products, mask=real)
    scale = tl.load(rstd + sample * groups + group)
    own = factor * grads - pixels * mean_grad - norms * mean_product
    tl.store(grad_before + place, scale * own, mask=real)
    tl.store(means + sample * groups + group, mean_grad)
    tl.store(means + (samples + sample) * groups + group, mean_product)


@triton.jit
def input_gradient(
    grad: tl.tensor,
    x: tl.tensor,
    grad_x: tl.tensor,
    means: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    before: tl.tensor,
    modulation: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Write the gradient of x; means: of `group_sums`; grid: (chunks, blocks, B)."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    centre, scale, factor, offset = coefficients(
        before, modulation, weight, bias, mean, rstd, sample, channel, channels,
        BEFORE, MODULATED, WIDTH,
    )  # fmt: skip
    groups = channels // WIDTH
    own_group = sample * groups + channel // WIDTH
    mean_grad = tl.load(means + own_group, mask=channel < channels, other=0.0)
    own_group += tl.num_programs(2) * groups
    mean_product = tl.load(means + own_group, mask=channel < channels, other=0.0)
    first = tl.program_id(0) * CHUNK_PIXELS
    end = tl.minimum(first + CHUNK_PIXELS, pixels)
    for start in range(first, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixel < end)[:, None] & (channel < channels)[None, :]
        place = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        normed = (values - centre[None, :]) * scale[None, :]
        own = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        own = gradient_before_silu(own, normed * factor[None, :] + offset[None, :], SILU)
        own = factor[None, :] * own - mean_grad[None, :] - normed * mean_product[None, :]
        tl.store(grad_x + place, scale[None, :] * own, mask=inside)

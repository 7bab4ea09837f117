# SPDX-License-Identifier: BSD-3-Clause
"""The specification of the ops in plain PyTorch. It has one function per op, which is slow and runs on any device.

Every kernel is tested against these functions. Pruning by ``magnitude``, ``random``, ``rescale_group``, ``mvue`` and
``unstructured`` agrees bit for bit, given the same seed. ``rescale`` and the products agree except for rounding,
because their sums have no fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

_WORD = 0xFFFFFFFF


def prune_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """``sdgp.prune_nm`` as a composition of PyTorch's own operators."""
    if n == m:
        return input.clone()
    scale, value = _scale_and_value(input, n, m, dim, method, seed)
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    result = torch.where(scale == 0, zero, value)
    return torch.empty_like(input).copy_(result)


def prune_nm_scale(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """Returns the factor by which ``prune_nm`` multiplies each element: 0 where it prunes."""
    if n == m:
        return torch.ones_like(input)
    return torch.empty_like(input).copy_(_scale_and_value(input, n, m, dim, method, seed)[0])


def compress_nm(
    input: Tensor, n: int, m: int, dim: int = -1, method: str = "magnitude", seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``sdgp.compress_nm``: takes the places that are not +0 after pruning, then the lowest indices, then 0 at 0."""
    size = input.shape[dim]
    groups = _groups(prune_nm(input, n, m, dim, method, seed).movedim(dim, -1), m)
    real = torch.arange(groups.shape[-2] * m, device=input.device).view(-1, m) < size
    chosen = _largest(real.long() + (_bits(groups) != 0), n)
    indices = (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n]  # of the chosen places, ascending
    inside = real.expand_as(groups).gather(-1, indices)
    zero = torch.zeros((), dtype=input.dtype, device=input.device)
    values = torch.where(inside, groups.gather(-1, indices), zero)
    indices = torch.where(inside, indices, 0).to(torch.uint8)
    return values.flatten(-2).movedim(-1, dim), indices.flatten(-2).movedim(-1, dim)


def decompress_nm(values: Tensor, indices: Tensor, m: int, size: int, dim: int = -1) -> Tensor:
    """``sdgp.decompress_nm``: writes the slots back to front. If two have the same index, the first one counts."""
    count = (size + m - 1) // m
    shape = values.movedim(dim, -1).shape[:-1]
    if values.numel() == 0:
        return values.new_zeros(*shape, size).movedim(-1, dim)
    n = values.shape[dim] // count
    slots, places = (x.movedim(dim, -1).reshape(*shape, count, n) for x in (values, indices.long()))
    groups = values.new_zeros(*shape, count, m)
    for slot in reversed(range(n)):
        groups.scatter_(-1, places[..., slot : slot + 1], slots[..., slot : slot + 1])
    return groups.flatten(-2)[..., :size].contiguous().movedim(-1, dim)


def spmm_nm(values: Tensor, indices: Tensor, m: int, dense: Tensor) -> Tensor:
    """``sdgp.spmm_nm``: the sum over slots of value x row of ``dense``. Rows that no slot names do not matter."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    count = (dense.shape[0] + m - 1) // m
    if count == 0:
        return values.new_zeros(*values.shape[:-1], dense.shape[1])
    group = torch.arange(count, device=values.device).repeat_interleave(values.shape[-1] // count)
    rows = dense.to(wide)[group * m + indices.long()]  # (..., slots, cols)
    return (values.to(wide).unsqueeze(-1) * rows).sum(-2).to(values.dtype)


def prune_nm_matmul(
    grad_output: Tensor, weight: Tensor, n: int, m: int, method: str = "magnitude", seed: Tensor | None = None
) -> Tensor:
    """``sdgp._ops.prune_nm_matmul``: prunes, then multiplies."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    pruned = prune_nm(grad_output, n, m, -1, method, seed)
    return (pruned.to(wide) @ weight.to(wide)).to(grad_output.dtype)


def conv2d_input_grad_nm(
    grad_output: Tensor,
    weight: Tensor,
    n: int,
    m: int,
    method: str,
    seed: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """``sdgp._ops.conv2d_input_grad_nm``: prunes, then calls PyTorch's transposed convolution."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    samples, out = grad_output.shape[:2]
    by_group = grad_output
    if groups > 1 and out // groups % m != 0:
        by_group = grad_output.reshape(samples * groups, out // groups, *grad_output.shape[2:])
    pruned = prune_nm(by_group, n, m, 1, method, seed).reshape(grad_output.shape)
    unread = [  # pixels at the end of the input that the convolution does not read
        size + 2 * p - d * (k - 1) - 1 - s * (out - 1)
        for size, p, d, k, s, out in zip(
            input_size, padding, dilation, weight.shape[2:], stride, grad_output.shape[2:], strict=True
        )
    ]
    result = torch.nn.functional.conv_transpose2d(
        pruned.to(wide), weight.to(wide), None, stride, padding, unread, groups, dilation
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return result.to(grad_output.dtype).contiguous(memory_format=memory_format)


def conv2d_weight_grad_nm(
    grad_output: Tensor,
    input: Tensor,
    n: int,
    m: int,
    method: str,
    seed: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """``sdgp._ops.conv2d_weight_grad_nm``: prunes along the pixels, then calls PyTorch's weight gradient."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    samples, out, height, width = grad_output.shape
    pruned = prune_nm(grad_output.reshape(samples, out, height * width), n, m, -1, method, seed)
    pruned = pruned.reshape(grad_output.shape).to(wide)
    size = (out, input.shape[1] // groups, *kernel_size)
    result = conv2d_weight(  # type: ignore[no-untyped-call]
        input.to(wide), size, pruned, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    gradient: Tensor = result.to(grad_output.dtype).contiguous(memory_format=memory_format)
    return gradient


def _scale_and_value(
    input: Tensor, n: int, m: int, dim: int, method: str, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    size = input.shape[dim]
    groups = _groups(input.movedim(dim, -1), m)
    length = groups.shape[-2] * m
    x = groups if groups.dtype == torch.float64 else groups.float()
    if method == "magnitude":
        scale, value = _masked(_largest(_magnitude_key(groups), n), x)
    elif method == "random":
        key = _random_keys(groups, seed)
        real = (torch.arange(length, device=input.device) < size).view(-1, m)
        scale, value = _masked(_largest(torch.where(real, key, 0), n), x)
    elif method == "rescale":
        keep = _largest(_magnitude_key(groups), n)
        scale, value = _rescale(x, keep, input, dim, size)
    elif method == "rescale_group":
        scale, value = _rescale_group(x, _largest(_magnitude_key(groups), n))
    elif method == "mvue":
        scale, value = _mvue(groups, x, n, seed)
    elif method == "unstructured":
        scale, value = _unstructured(groups, x, _step(input, n, m), n, seed)
    else:
        raise ValueError(f"prune_nm: unknown method {method!r}")
    return tuple(t.flatten(-2)[..., :size].movedim(-1, dim) for t in (scale, value))  # type: ignore[return-value]


def _groups(rows: Tensor, m: int) -> Tensor:
    """(..., size) -> (..., ceil(size / m), m). The padding is zero: it loses every tie and adds nothing to a sum."""
    size = rows.shape[-1]
    count = (size + m - 1) // m
    return torch.nn.functional.pad(rows, (0, count * m - size)).reshape(*rows.shape[:-1], count, m)


def _masked(keep: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return keep.to(x.dtype), x


def _magnitude_key(x: Tensor) -> Tensor:
    """Returns |x| as the integer that its bits form: -0 equals 0, and NaN is above inf."""
    bits = _bits(x)
    return bits & torch.iinfo(bits.dtype).max


def _bits(x: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits: Tensor = x.contiguous().view(integer)
    return bits


def _largest(key: Tensor, n: int) -> Tensor:
    """Returns True for the n largest values along the last dimension. On a tie the lower index wins."""
    order = key.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(key, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def _sequential_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension in index order, rounding at each step: (..., m) -> (...)."""
    total = torch.zeros_like(x[..., 0])
    for element in x.unbind(-1):
        total = total + element
    return total


def _ratio(all: Tensor, kept: Tensor) -> Tensor:
    """Returns all / kept, at most the largest finite number where ``all`` is finite: then kept values stay finite."""
    ratio = torch.where(kept == 0, torch.ones_like(all), all / kept)
    return torch.where(all.isfinite(), ratio.clamp(max=torch.finfo(all.dtype).max), ratio)


def _rescale(x: Tensor, keep: Tensor, input: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor]:
    magnitude = x.abs()
    zero = torch.zeros_like(x)
    totals = []
    for part in (magnitude, torch.where(keep, magnitude, zero)):
        flat = part.flatten(-2)  # (..., length)
        # One factor per (sample, channel); the sample is the first other dimension. In 2-D: one factor per row.
        sums = list(range(1, flat.ndim - 1)) if input.ndim > 2 else [-1]
        total = flat.sum(sums, keepdim=True) if sums else flat
        totals.append(total)
    factor = _ratio(*totals).expand_as(x.flatten(-2)).reshape(x.shape)
    return torch.where(keep, factor, zero), torch.where(x == 0, zero, x * factor)  # 0 stays 0 if the factor is inf


def _rescale_group(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = x.abs()
    zero = torch.zeros_like(x)
    factor = _ratio(_sequential_sum(magnitude), _sequential_sum(torch.where(keep, magnitude, zero))).unsqueeze(-1)
    return torch.where(keep, factor, zero), x * factor


def _mvue(groups: Tensor, x: Tensor, n: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Implements ``mvue`` (Note [mvue] in cpp/kernels/mvue-inl.h)."""
    magnitude = x.abs()
    zero = torch.zeros_like(x)
    total = _sequential_sum(magnitude)
    step = torch.full_like(total, torch.inf)
    rest, places = total, torch.full_like(total, n)
    smallest = 2.0**-149 if x.dtype == torch.float32 else 2.0**-1074
    for _ in range(n):
        mean = rest / places
        mean = torch.where((mean == 0) & (rest > 0), torch.full_like(mean, smallest), mean)  # the mean underflowed
        step = torch.where((places > 0) & (rest > 0) & (mean < step), mean, step)
        above = magnitude >= step.unsqueeze(-1)
        rest = _sequential_sum(torch.where(above, zero, magnitude))
        places = n - above.sum(-1).to(x.dtype)

    point = _uniform(groups, seed).to(x.dtype) * step
    reached = torch.zeros_like(step)
    left = torch.full_like(step, n)
    keeps = []
    for element in magnitude.unbind(-1):
        over = element >= step
        reached = reached + torch.where(over, torch.zeros_like(step), element)
        hit = reached > point
        point = point + torch.where(hit, step, torch.zeros_like(step))
        keep = (over | hit) & (left > 0)
        left = left - keep.to(x.dtype)
        keeps.append(keep)
    keep = torch.stack(keeps, -1)
    above = magnitude >= step.unsqueeze(-1)
    finite = total.isfinite().unsqueeze(-1)
    keep = torch.where(finite, keep, _largest(_magnitude_key(groups), n))
    sampled = ~above & finite
    one = torch.ones_like(x)
    scale = torch.where(keep, torch.where(sampled, step.unsqueeze(-1) / magnitude, one), zero)
    return scale, torch.where(sampled, torch.copysign(step.unsqueeze(-1).expand_as(x), x), x)


_SAMPLE = 8192


def _step(input: Tensor, n: int, m: int) -> Tensor:
    """Finds the step with which n of m elements stay in the mean, from a sample of them."""
    spacing = max(1, -(-input.numel() // _SAMPLE))
    while math.gcd(spacing, input.numel()) > 1:
        spacing += 1
    sample = input.reshape(-1)[::spacing].double().abs()
    magnitudes = sample[sample.isfinite()].tolist()
    wanted, step = len(magnitudes) * n / m, torch.inf
    while True:
        rest, places = 0.0, wanted
        for magnitude in magnitudes:
            if magnitude < step:
                rest += magnitude
            else:
                places -= 1
        if places <= 0 or not rest / places < step:
            return torch.tensor(step, dtype=torch.float64, device=input.device)
        step = rest / places


def _unstructured(groups: Tensor, x: Tensor, step: Tensor, n: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Implements ``unstructured`` (Note [Unstructured] in cpp/kernels/mvue-inl.h)."""
    magnitude, zero = x.abs(), torch.zeros_like(x)
    limits, least = torch.finfo(groups.dtype), 2.0 ** (-999 if x.dtype == torch.float64 else -103)
    least = max(least, limits.smallest_normal * limits.eps)  # so 2^24 / step is finite
    step = step.clamp(least, limits.max).to(x.dtype).to(groups.dtype).to(x.dtype)
    below = magnitude < step
    share = torch.where(below, magnitude * (torch.full_like(step, 2.0**24) / step), zero).long()
    end = (_random_state(groups, seed)[1] >> 8).unsqueeze(-1) + share.cumsum(-1)
    keep = ~below | ((end - share) >> 24 != end >> 24)
    finite = x.isfinite().all(-1, keepdim=True)
    keep = torch.where(finite, keep, _largest(_magnitude_key(groups), n))
    sampled = below & finite
    scale = torch.where(keep, torch.where(sampled, step / magnitude, torch.ones_like(x)), zero)
    return scale, torch.where(sampled, torch.copysign(step.expand_as(x), x), x)


# Random numbers (Note [Random numbers] in cpp/kernels/random_numbers-inl.h). Each int64 holds a 32-bit word.


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts a 64-bit word to the right and fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def _start(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    return x ^ (x >> 15)


def _finish(x: Tensor) -> Tensor:
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _random_state(groups: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=groups.device)
    z = seed.reshape(()) + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    k0, k1 = z & _WORD, _shift_right(z, 32)
    index = torch.arange(groups[..., 0].numel(), device=groups.device).view(groups.shape[:-1])
    a = _finish(_start((index & _WORD) ^ k0))
    b = _finish(_start((a + (_shift_right(index, 32) ^ k1)) & _WORD))
    return a, b


def _random_keys(groups: Tensor, seed: Tensor | None) -> Tensor:
    a, b = _random_state(groups, seed)
    step = torch.arange(groups.shape[-1], device=groups.device) * 0x9E3779B9 & _WORD
    return _finish(_start((b.unsqueeze(-1) + step) & _WORD) ^ a.unsqueeze(-1)) >> 1


def _uniform(groups: Tensor, seed: Tensor | None) -> Tensor:
    _, b = _random_state(groups, seed)
    return ((b >> 9) * 2 + 1).double() * 2.0**-24

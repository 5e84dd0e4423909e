"""Lengths, points and projections of polylines in parameter space.

A path is a tensor ``(..., K + 1, d)``: K + 1 beads joined by K straight segments. Leading
dimensions are pairs. A *fraction* s in [0, 1] is the arclength from the first bead, divided by the
length of the path.
"""

import torch
from torch import Tensor


def chord(theta_a: Tensor, theta_b: Tensor, num_segments: int) -> Tensor:
    """Returns the straight path between ``(..., d)`` points, in equal segments, with exact ends."""
    s = torch.linspace(0, 1, num_segments + 1, dtype=theta_a.dtype, device=theta_a.device)
    return torch.lerp(theta_a[..., None, :], theta_b[..., None, :], s[:, None])


def segment_lengths(path: Tensor) -> Tensor:
    """Returns the Euclidean length of every segment, ``(..., K)``."""
    return torch.linalg.vector_norm(path.diff(dim=-2), dim=-1)


def length(path: Tensor) -> Tensor:
    """Returns the length |γ| of a polyline, ``(...)``."""
    return segment_lengths(path).sum(-1)


def normalized_length(path: Tensor) -> Tensor:
    """Returns |γ| / |θ_a - θ_b| ≥ 1, ``(...)``.

    It is 1 by convention if all beads are the same point.
    """
    total = length(path)
    distance = torch.linalg.vector_norm(path[..., -1, :] - path[..., 0, :], dim=-1)
    return torch.where((distance == 0) & (total == 0), torch.ones_like(total), total / distance)


def fractions(path: Tensor) -> Tensor:
    """Returns the arclength fraction of every bead, ``(..., K + 1)``, from exactly 0 to exactly 1.

    The beads of a path of zero length get evenly spaced fractions.
    """
    lengths = segment_lengths(path)
    lengths = torch.where(lengths.sum(-1, keepdim=True) > 0, lengths, torch.ones_like(lengths))
    reached = torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))
    return reached / reached[..., -1:]


def points_at(path: Tensor, s: Tensor) -> Tensor:
    """Returns the points ``(..., m, d)`` at fractions ``(..., m)``; 0 and 1 give the exact ends."""
    knots = fractions(path)
    s = s.to(path.dtype).expand(*knots.shape[:-1], s.shape[-1]).contiguous()
    segment = torch.searchsorted(knots, s, right=True).sub(1).clamp(0, path.shape[-2] - 2)
    left, right = knots.gather(-1, segment), knots.gather(-1, segment + 1)
    weight = ((s - left) / (right - left).clamp_min(torch.finfo(s.dtype).tiny)).clamp(0, 1)
    index = segment[..., None].expand(*segment.shape, path.shape[-1])
    return torch.lerp(path.gather(-2, index), path.gather(-2, index + 1), weight[..., None])


def resample(path: Tensor, num_segments: int) -> Tensor:
    """Returns a path of ``num_segments`` segments whose beads are evenly spaced along ``path``.

    Corners of ``path`` between the new beads are cut off.
    """
    s = torch.linspace(0, 1, num_segments + 1, dtype=path.dtype, device=path.device)
    return points_at(path, s)


def refine(path: Tensor, num_segments: int) -> Tensor:
    """Returns the curve ``(n, d)`` cut into ``num_segments`` segments that keep its corners.

    The longest segments are cut first. If ``num_segments`` is too small to keep all corners, this
    is `resample`, which cuts them off.
    """
    lengths = segment_lengths(path)
    if len(lengths) > num_segments:
        return resample(path, num_segments)
    counts = torch.ones_like(lengths, dtype=torch.long)
    for _ in range(num_segments - len(lengths)):
        counts[(lengths / counts).argmax()] += 1
    ends = zip(path[:-1], path[1:], counts.tolist(), strict=True)
    return torch.cat([*(chord(a, b, k)[:-1] for a, b, k in ends), path[-1:]])


def subdivide(path: Tensor, per_segment: int) -> Tensor:
    """Returns the same curve with each segment cut into n = ``per_segment`` equal parts.

    The result is ``(..., K·n + 1, d)``.
    """
    weight = torch.arange(per_segment, dtype=path.dtype, device=path.device) / per_segment
    inner = torch.lerp(path[..., :-1, None, :], path[..., 1:, None, :], weight[:, None])
    return torch.cat((inner.flatten(-3, -2), path[..., -1:, :]), dim=-2)


def project(path: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the path's point nearest to ``point (..., d)``, and its arclength fraction.

    They are ``(..., d)`` and ``(...)``.
    """
    start, step = path[..., :-1, :], path.diff(dim=-2)
    squared = step.square().sum(-1).clamp_min(torch.finfo(path.dtype).tiny)
    weight = (((point[..., None, :] - start) * step).sum(-1) / squared).clamp(0, 1)
    foot = start + weight[..., None] * step
    distance = torch.linalg.vector_norm(foot - point[..., None, :], dim=-1)
    segment = distance.argmin(-1, keepdim=True)
    knots = fractions(path)
    s = torch.lerp(knots[..., :-1], knots[..., 1:], weight).gather(-1, segment).squeeze(-1)
    nearest = foot.gather(-2, segment[..., None].expand(*segment.shape, path.shape[-1]))
    return nearest.squeeze(-2), s

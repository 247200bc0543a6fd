"""Augmentation of a batch of training images, with a few tensor operations per batch."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedward.plan.schema import FLIP_AXES, Augmentation
from fedward.tasks.base import Target
from fedward_client.data.boxes import within


def augment(
    images: Tensor,
    targets: Tensor | None,
    augmentation: Augmentation,
    generator: torch.Generator,
    kind: Target = "masks",
) -> tuple[Tensor, Tensor | None]:
    """Change each image at random, and its mask or its boxes in the same way.

    Parameters
    ----------
    images : Tensor
        ``(N, C, H, W)`` or ``(N, C, H, W, D)``, floating point, on any device.
    targets : Tensor or None
        ``(N, H, W)`` or ``(N, H, W, D)`` label maps, whose dtype is kept; or boxes (see
        :func:`moved_boxes`); or labels, which nothing moves.
    augmentation : Augmentation
        Strengths; what is 0 is not done.
    generator : torch.Generator
        A CPU generator: the same state gives the same changes on every device.
    kind : str
        What `targets` are.

    Returns
    -------
    tuple
        The changed images and targets; the very same tensors when nothing is active.

    Notes
    -----
    `vertical` mirrors rows (axis 0), `horizontal` columns (axis 1), `depth` slices (axis 2).
    A volume turns about a random axis. Outside, the border is repeated. Images are interpolated
    linearly, masks by nearest neighbour. Angles and shapes are in pixels: a voxel counts as a cube.
    """
    if not augmentation.active or len(images) == 0:
        return images, targets
    if _is_geometric(augmentation):
        size = tuple(images.shape[2:])
        theta = _matrices(len(images), size, augmentation, generator).to(images)
        grid = F.affine_grid(theta, [len(images), 1, *size], align_corners=False)
        images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
        if targets is not None and kind == "masks":
            layer = targets.unsqueeze(1).to(images.dtype)
            moved = F.grid_sample(layer, grid, "nearest", "border", align_corners=False)
            targets = moved.squeeze(1).to(targets.dtype)
        elif targets is not None and kind == "boxes":
            targets = moved_boxes(targets, theta, size)
    return _intensity(images, augmentation, generator), targets


def moved_boxes(boxes: Tensor, theta: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boxes around where the corners of boxes go.

    Parameters
    ----------
    boxes : Tensor
        ``(N, M, 2 D + 1)``: lower and upper corners in pixels, and the class from 1; 0: no box.
    theta : Tensor
        ``(N, D, D + 1)`` maps from output to input, as `affine_grid` takes them.
    size : tuple of int
        Sides of the images.

    Returns
    -------
    Tensor
        The same shape, cut at the border. A box of which too little is left is gone
        (:data:`fedward_client.data.boxes.VISIBLE`).
        Of a turned box the upright one around its corners counts, which is larger than what it is
        around.
    """
    d = len(size)
    sides = boxes.new_tensor(size)
    ends = boxes[..., : 2 * d].reshape(*boxes.shape[:-1], 2, d)
    which = torch.cartesian_prod(*[torch.arange(2)] * d)
    corners = torch.stack([ends[..., which[:, axis], axis] for axis in range(d)], dim=-1)
    placed = (2 * corners / sides - 1).flip(-1) - theta[:, None, None, :, d]
    placed = (placed @ torch.linalg.inv(theta[:, None, :, :d]).mT).flip(-1)
    found = (placed + 1) * sides / 2
    low, high, kept = within(found.amin(2), found.amax(2), sides)
    there = (kept & (boxes[..., -1] > 0)).unsqueeze(-1)
    moved: Tensor = torch.cat([low, high, boxes[..., -1:]], dim=-1) * there
    return moved


def with_channels_as_in(
    before: Tensor, images: Tensor, chance: float, generator: torch.Generator
) -> Tensor:
    """Changed images whose missing channels are zeros again, and some others are too.

    Parameters
    ----------
    before, images : Tensor
        ``(N, C, *S)`` before they were changed, and after.
    chance : float
        Of each channel to be dropped. An image of which that would leave nothing keeps all.
    generator : torch.Generator
        A CPU generator.

    Returns
    -------
    Tensor
        ``(N, C, *S)``. What becomes of an image depends on no other one.
    """
    there = before.flatten(2).any(2)
    kept = there & (torch.rand(there.shape, generator=generator) >= chance).to(there.device)
    kept = torch.where(kept.any(1, keepdim=True), kept, there)
    return images * kept.reshape(*kept.shape, *[1] * (images.dim() - 2)).to(images)


def _is_geometric(a: Augmentation) -> bool:
    return bool(a.flip) or any((a.rotate, a.scale, a.shift))


def _matrices(n: int, size: tuple[int, ...], a: Augmentation, generator: torch.Generator) -> Tensor:
    """``(N, d, d + 1)`` maps from output to input, in the normalised units of `affine_grid`."""
    d = len(size)
    draw = 2 * torch.rand(n, 4 + 2 * d, generator=generator) - 1  # all at once: one call
    angle, zoom = math.radians(a.rotate) * draw[:, 0], 1 + a.scale * draw[:, 1]
    turn = _rotation_2d(angle) if d == 2 else _rotation_3d(angle, draw[:, 2:4])
    linear = turn / zoom[:, None, None]
    for name in a.flip:
        axis = FLIP_AXES[name]
        sign = torch.where(draw[:, 4 + axis] < 0, -1.0, 1.0)
        # Mirrored after the rotation, as seen from the output.
        linear[:, :, axis] = linear[:, :, axis] * sign[:, None]
    sides = torch.tensor(size, dtype=torch.float32)
    linear = linear * (sides[None, None, :] / sides[None, :, None])
    offset = 2 * a.shift * draw[:, 4 + d :, None]
    # affine_grid counts axes from the last: (x, y, z) is (column, row) or (slice, column, row).
    return torch.cat([linear.flip(1, 2), offset.flip(1)], dim=2)


def _rotation_2d(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


def _rotation_3d(angle: Tensor, draw: Tensor) -> Tensor:
    """Rodrigues' formula about an axis drawn uniformly on the sphere."""
    height, around = draw[:, 0], math.pi * draw[:, 1]
    ring = (1 - height**2).clamp_min(0).sqrt()
    x, y, z = ring * around.cos(), ring * around.sin(), height
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)
    sin, versine = angle.sin()[:, None, None], (1 - angle.cos())[:, None, None]
    return torch.eye(3) + sin * cross + versine * (cross @ cross)


def _intensity(images: Tensor, a: Augmentation, generator: torch.Generator) -> Tensor:
    if a.bias_field:
        images = images * _bias_fields(images, a.bias_field, generator)
    if a.contrast or a.brightness:
        each = (len(images),) + (1,) * (images.dim() - 1)
        draw = (2 * torch.rand(2, len(images), generator=generator) - 1).to(images)
        if a.contrast:
            mean = images.mean(dim=tuple(range(1, images.dim())), keepdim=True)
            images = mean + (1 + a.contrast * draw[0].reshape(each)) * (images - mean)
        if a.brightness:
            images = images + a.brightness * draw[1].reshape(each)
    if a.gamma:
        exponents = math.log1p(a.gamma) * (2 * torch.rand(len(images), generator=generator) - 1)
        images = with_gamma(images, exponents.exp())
    if a.blur:
        images = blurred(images, a.blur * torch.rand(len(images), generator=generator), a.blur)
    if a.low_resolution:
        kept = 1 - a.low_resolution * torch.rand(len(images), generator=generator)
        images = torch.cat(
            [_lowered(x[None], f) for x, f in zip(images, kept.tolist(), strict=True)]
        )
    if a.noise:
        noise = torch.randn(images.shape, generator=generator)
        images = images + a.noise * noise.to(images)
    return images


def with_gamma(images: Tensor, exponents: Tensor) -> Tensor:
    """Each image's range raised to an exponent ``(N,)`` of its own, as MONAI's AdjustContrast."""
    axes = tuple(range(1, images.dim()))
    low = images.amin(dim=axes, keepdim=True)
    span = images.amax(dim=axes, keepdim=True) - low
    power = exponents.to(images).reshape(-1, *[1] * len(axes))
    return ((images - low) / (span + 1e-7)) ** power * span + low


def blurred(images: Tensor, deviations: Tensor, most: float) -> Tensor:
    """Each image smoothed by a Gaussian of a deviation ``(N,)`` of its own, in pixels.

    The weights are those of MONAI's GaussianFilter, the integrals over each pixel. The border is
    repeated. Every image has a kernel wide enough for a deviation of `most`, so that the work does
    not depend on the draw.
    """
    n, c, *sides = images.shape
    reach = math.ceil(4 * most)
    edges = torch.arange(-reach, reach + 2) - 0.5
    scaled = edges / (math.sqrt(2) * deviations.clamp_min(1e-3)[:, None])
    weights = 0.5 * torch.erf(scaled).diff(dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(images).repeat_interleave(c, dim=0)
    convolve = F.conv2d if len(sides) == 2 else F.conv3d
    out = images.reshape(1, n * c, *sides)
    for axis in range(len(sides)):
        pads, shape = [0, 0] * len(sides), [1] * len(sides)
        pads[2 * (len(sides) - 1 - axis)] = pads[2 * (len(sides) - 1 - axis) + 1] = reach
        shape[axis] = -1
        kernel = weights.reshape(n * c, 1, *shape)
        out = convolve(F.pad(out, pads, "replicate"), kernel, groups=n * c)
    return out.reshape(images.shape)


def _lowered(image: Tensor, kept: float) -> Tensor:
    """One image ``(1, C, *S)`` with fewer pixels along each side, enlarged again (linear)."""
    sides = image.shape[2:]
    small = F.interpolate(image, [max(1, round(n * kept)) for n in sides], mode="nearest-exact")
    mode = "bilinear" if len(sides) == 2 else "trilinear"
    return F.interpolate(small, list(sides), mode=mode, align_corners=False)


_DEGREE: Final = 3  # of the field's polynomials, as in MONAI's RandBiasField


def _bias_fields(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """``(N, 1, *S)``: exp of a sum of products of Legendre polynomials, one along each side."""
    n, sides = len(images), images.shape[2:]
    shape = (_DEGREE + 1,) * len(sides)
    coefficients = most * (2 * torch.rand(n, *shape, generator=generator) - 1)
    order = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    field = (coefficients * (order <= _DEGREE)).to(images)
    for side in sides:  # one side after another: its coefficients go, its pixels come last
        x = torch.linspace(-1, 1, side, device=images.device, dtype=images.dtype)
        rows = torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2])
        field = torch.tensordot(field, rows, dims=([1], [0]))
    return field.exp()[:, None]

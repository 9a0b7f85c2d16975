"""Families that need a whole matrix: linear algebra on the stream's normals, in float64 on the CPU.

Unlike a table look-up, LAPACK's result depends on its version and machine in the last bits: tensors of these families
are *equal to tolerance*, not to the bit, and a slice costs the whole tensor.
"""

from __future__ import annotations

import math

import torch

SPECTRAL_RADIUS = 0.95  # paper section 2


def orthogonal(normals: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows, or columns where there are fewer of them: `(..., O, I) -> (..., O, I)`, gain 1.

    The factor Q of a QR decomposition with the signs of R's diagonal, which makes it uniform (Mezzadri 2007).
    """
    tall = normals if normals.shape[-2] >= normals.shape[-1] else normals.mT
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q if tall is normals else q.mT


def spectral_radius(normals: torch.Tensor) -> torch.Tensor:
    """The normals rescaled: largest eigenvalue modulus 0.95, largest singular value where not square (ours)."""
    if normals.shape[-2] == normals.shape[-1]:
        largest = torch.linalg.eigvals(normals).abs().amax(-1)
    else:
        largest = torch.linalg.matrix_norm(normals, 2)
    return normals * (SPECTRAL_RADIUS / largest)[..., None, None]


TRANSFORMS = {"orthogonal": orthogonal, "spectral_radius": spectral_radius}


def transformed(family: str, normals: torch.Tensor, stacked: int) -> torch.Tensor:
    """`family`'s transform of a tensor taken as `stacked` matrices `(O, I)`; the shape stays.

    Args:
        family: "orthogonal" or "spectral_radius".
        normals: float64, any shape of two or more dimensions; a kernel is taken as `(O, I * kernel)`.
        stacked: number of matrices along the leading dimensions, 1 but for fused experts.
    """
    rows = math.prod(normals.shape[:-1]) // stacked if stacked > 1 else normals.shape[0]
    matrices = normals.reshape(stacked, rows, -1)
    return TRANSFORMS[family](matrices).reshape(normals.shape)

"""The weighted sum over channels, averaged over the cells with alike features.

    S_q = sum_c W_cq A_cq,   k_pq = max(0, cos(a_p, a_q))^power,   M_p = max(0, sum_q k_pq S_q / sum_q k_pq)

with a_p = (A_1p ... A_Cp) the features of cell p. A program owns a block of cells p and walks over all cells q, as
attention does: the products a_p . a_q, the norms and S_q come from the same pass over the channels, and no matrix of
affinities reaches the memory. W_cq = w_c for CF-CAM, a weight of each cell's own for element-wise methods.

The matrix units multiply float32 in TF32, with eleven significant bits, so each factor is split into two such parts and
three of their products are added: close to float32's accuracy. Triton's own tf32x3 does the same, but not for AMD.

Floor: C * h * w reads; 2 * C * (h * w)^2 operations.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv, next_power_of_2


@triton.jit
def high_part(x):
    """The leading eleven significant bits of a float32, which TF32 holds exactly."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def affinity_sum_kernel(
    a_ptr,
    w_ptr,
    grid_ptr,
    n_channels,
    n_cells,
    power,
    a_stride_b,
    a_stride_c,
    a_stride_p,
    w_stride_b,
    w_stride_c,
    w_stride_p,
    RELU: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_per_image = tl.cdiv(n_cells, BLOCK_P)
    image = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    cell = ((tl.program_id(0) % blocks_per_image) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    in_cells = cell < n_cells
    a_ptr += image * a_stride_b
    w_ptr += image * w_stride_b

    total = tl.zeros([BLOCK_P], tl.float32)
    mass = tl.zeros([BLOCK_P], tl.float32)
    first = 0
    while first < n_cells:
        other = (first + tl.arange(0, BLOCK_Q)).to(tl.int64)
        in_others = other < n_cells
        product = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
        # Added up over the channels behind the loop: in it, every sum across threads would be a barrier.
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        other_squares = tl.zeros([BLOCK_C, BLOCK_Q], tl.float32)
        other_terms = tl.zeros([BLOCK_C, BLOCK_Q], tl.float32)
        # Bounds known at compile time: only then are the loads of the next steps under way during this one.
        for step in range(N_STEPS):
            channel = (step * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
            in_channels = channel < n_channels
            of_cell = cell[:, None] * a_stride_p + channel[None, :] * a_stride_c
            of_other = channel[:, None] * a_stride_c + other[None, :] * a_stride_p
            of_weight = channel[:, None] * w_stride_c + other[None, :] * w_stride_p
            inside = in_channels[:, None] & in_others[None, :]
            a = tl.load(a_ptr + of_cell, mask=in_cells[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
            b = tl.load(a_ptr + of_other, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + of_weight, mask=inside, other=0.0).to(tl.float32)
            a_high = high_part(a)
            b_high = high_part(b)
            product = tl.dot(a - a_high, b_high, product, input_precision="tf32")
            product = tl.dot(a_high, b - b_high, product, input_precision="tf32")
            product = tl.dot(a_high, b_high, product, input_precision="tf32")
            squares += a * a
            other_squares += b * b
            other_terms += b * w
        square = tl.sum(squares, axis=1)
        other_square = tl.sum(other_squares, axis=0)
        other_sum = tl.sum(other_terms, axis=0)
        # A cell without features is like no cell, not even itself, and its sum is 0 anyway.
        cosine = product / tl.sqrt(tl.where(square > 0, square, 1.0))[:, None]
        cosine = cosine / tl.sqrt(tl.where(other_square > 0, other_square, 1.0))[None, :]
        alike = cosine > 0
        affinity = tl.where(alike, tl.exp2(power * tl.log2(tl.where(alike, cosine, 1.0))), 0.0)
        total += tl.sum(affinity * other_sum[None, :], axis=1)
        mass += tl.sum(affinity, axis=1)
        first += BLOCK_Q

    value = total / tl.where(mass > 0, mass, 1.0)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(grid_ptr + image * n_cells + cell, value, mask=in_cells)


def affinity_sum(activations, weights, power, relu=True):
    """The averaged weighted sum over channels, by default its positive part: float32 (B, N).

    Args:
        activations, weights: (B, C, N), float16, bfloat16 or float32, any strides; expand weights (B, C, 1) to
            give every cell of a channel the same.
        power: exponent of the cosine, above 0.
    """
    batch, n_channels, n_cells = activations.shape
    grid = torch.empty(batch, n_cells, dtype=torch.float32, device=activations.device)
    # Small grids: more programs an image, so that one image alone does not wait for one multiprocessor. These are the
    # largest blocks and most stages that no supported version of the compiler spills registers for.
    block_p, num_warps, num_stages = (16, 4, 2) if n_cells <= 256 else (32, 8, 3)
    block_c = 32
    block_q = max(16, min(next_power_of_2(n_cells), 64))
    affinity_sum_kernel[(batch * cdiv(n_cells, block_p),)](
        activations,
        weights,
        grid,
        n_channels,
        n_cells,
        float(power),
        *activations.stride(),
        *weights.stride(),
        RELU=relu,
        N_STEPS=cdiv(n_channels, block_c),
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return grid

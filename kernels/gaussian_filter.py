"""The separable Gaussian on grids: for callers that want the filtered gradients themselves.

    out = K_y g K_x^T

with K the filter matrix of an axis (`cfcam_gpu.gaussian.filter_matrix`), any boundary. The weights of CF-CAM do not
need it: the mean of a filtered grid is one dot product (`channel_statistics`). One program filters a block of lines
along one axis; the second launch takes the other.

Floor: one read and one write of the grids a launch; 2 * n operations a cell along an axis of n cells.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

CELLS_PER_PROGRAM = 2048


@triton.jit
def gaussian_filter_kernel(
    grids_ptr,
    matrix_ptr,
    out_ptr,
    n_lines,
    n,
    lines_inner,
    stride_outer,
    stride_inner,
    stride_cell,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A line is a row or a column of a grid: `lines_inner` of them lie in each grid.
    line = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_lines = line < n_lines
    start_of_line = (line // lines_inner).to(tl.int64) * stride_outer + (line % lines_inner) * stride_inner
    cell = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cells = cell < n
    total = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    source = 0
    while source < n:
        value = tl.load(grids_ptr + start_of_line + source * stride_cell, mask=in_lines, other=0.0).to(tl.float32)
        tap = tl.load(matrix_ptr + cell * n + source, mask=in_cells, other=0.0)
        total += value[:, None] * tap[None, :]
        source += 1
    offset = start_of_line[:, None] + cell[None, :] * stride_cell
    tl.store(out_ptr + offset, total, mask=in_lines[:, None] & in_cells[None, :])


def gaussian_filter(grids, rows, columns):
    """Grids float32 (N, h, w), filtered along both axes, from contiguous grids float32 (N, h, w).

    Args:
        rows: float32 (h, h), the filter matrix along y; columns: float32 (w, w), along x.
    """
    n_grids, height, width = grids.shape
    for matrix, n, other, inner, along in ((columns, width, height, width, 1), (rows, height, width, 1, width)):
        out = torch.empty_like(grids)
        block_n = min(next_power_of_2(n), 64)
        block_l = max(16, CELLS_PER_PROGRAM // block_n)
        n_lines = n_grids * other
        gaussian_filter_kernel[(cdiv(n_lines, block_l), cdiv(n, block_n))](
            grids,
            matrix,
            out,
            n_lines,
            n,
            other,
            height * width,
            inner,
            along,
            BLOCK_L=block_l,
            BLOCK_N=block_n,
            num_warps=4,
        )
        grids = out
    return grids

"""DBSCAN's labels from the bit masks: components of the core channels, numbered as scikit-learn does; and eps.

One program an image. Trees grow by hooking: first every core points at its smallest core neighbour; then, in
rounds, every core with a neighbour outside its own tree hooks the larger root of the two under the smaller one, until
no core has any. What is outside a tree is one AND NOT with the tree's own mask, 32 channels at a time. Roots are the
smallest of their trees, so that the order of the roots is the order of scikit-learn's clusters; a border channel
takes the lowest-numbered cluster among its core neighbours. The result does not depend on the order of
execution: hooking takes minima, masks are unions.

Floor: R^2 / 8 bytes read a round, of which the typical image needs three.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.constants import LARGEST_FLOAT32_BITS, LARGEST_INT32, NOISE
from cfcam_gpu.kernels.launch import next_power_of_2

WORDS_PER_STEP = 8192
"""Mask words that one step of a loop over rows holds in registers."""


@triton.jit
def lowest_bit(words, word):
    """Position of the lowest set bit of each row of words (R, W); the largest int32 where there is none."""
    # The lowest bit alone is a power of two, whose float32 exponent is its position.
    alone = (words & (-words)).to(tl.uint32, bitcast=True).to(tl.float32)
    position = word[None, :] * 32 + (alone.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.min(tl.where(words != 0, position, LARGEST_INT32), axis=1)


@triton.jit
def connected_components_kernel(
    bits_ptr,
    degree_ptr,
    member_ptr,
    n_rows_ptr,
    min_samples_ptr,
    fraction_ptr,
    below_ptr,
    above_ptr,
    tree_ptr,
    root_ptr,
    hook_ptr,
    labels_ptr,
    eps_ptr,
    eps_floor,
    n_channels,
    max_rows,
    n_words,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOG_BLOCK_R: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    bits_ptr += image * max_rows * n_words
    tree_ptr += image * max_rows * n_words
    degree_ptr += image * max_rows
    member_ptr += image * max_rows
    root_ptr += image * max_rows
    hook_ptr += image * max_rows
    labels_ptr += image * n_channels
    n_rows = tl.load(n_rows_ptr + image)
    min_samples = tl.load(min_samples_ptr + n_rows)

    # eps, for the caller: the labels need only the neighbours.
    fraction = tl.load(fraction_ptr + n_rows)
    below = tl.load(below_ptr + image, mask=n_rows > 1, other=0.0)
    above_bits = tl.load(above_ptr + image)
    between = (fraction > 0) & (n_rows > 1)
    above = tl.where(between, above_bits, 0).to(tl.float32, bitcast=True)
    # Rounding may carry the interpolated value up to `above`, which is no neighbour.
    last = tl.where(between & (above > below), above_bits - 1, LARGEST_FLOAT32_BITS).to(tl.float32, bitcast=True)
    eps = tl.where(between, tl.minimum(below + (above - below) * fraction, last), below)
    tl.store(eps_ptr + image, tl.maximum(eps, eps_floor))

    row = tl.arange(0, BLOCK_R)
    word = tl.arange(0, BLOCK_R // 32)
    # Of one row alone no neighbours were written.
    used_word = (word < tl.cdiv(n_rows, TILE) * (TILE // 32)) & (n_rows > 1)
    is_core = (row < n_rows) & (tl.load(degree_ptr + row, mask=row < n_rows, other=0) >= min_samples)
    core_bits = tl.reshape(is_core.to(tl.int32), [BLOCK_R // 32, 32]) << tl.arange(0, 32)[None, :]
    core_word = tl.sum(core_bits, axis=1)

    # Every core under its smallest core neighbour, itself included.
    start = 0
    while start < n_rows:
        r = start + tl.arange(0, ROWS)
        in_rows = r < n_rows
        loaded = in_rows[:, None] & used_word[None, :]
        near = tl.load(bits_ptr + r[:, None] * n_words + word[None, :], mask=loaded, other=0) & core_word[None, :]
        core = in_rows & (tl.load(degree_ptr + r, mask=in_rows, other=0) >= min_samples)
        tl.store(hook_ptr + r, tl.where(core, lowest_bit(near, word), r), mask=in_rows)
        start += ROWS
    tl.debug_barrier()
    root = tl.load(hook_ptr + row, mask=row < n_rows, other=0)
    root = tl.where(row < n_rows, root, row)
    for _ in tl.static_range(LOG_BLOCK_R):
        root = tl.gather(root, root, 0)

    n_outside = tl.sum(is_core.to(tl.int32), axis=0)
    while n_outside > 0:
        tl.debug_barrier()
        tl.store(root_ptr + row, root, mask=row < n_rows)
        tl.store(hook_ptr + row, row, mask=row < n_rows)
        tl.debug_barrier()
        # The mask of each tree, in the row of its root.
        start = 0
        while start < n_rows:
            r = start + tl.arange(0, ROWS)
            own = tl.load(root_ptr + r, mask=r < n_rows, other=-1) == r
            empty = tl.zeros([ROWS, BLOCK_R // 32], tl.int32)
            cleared = own[:, None] & used_word[None, :]
            tl.store(tree_ptr + r[:, None] * n_words + word[None, :], empty, mask=cleared)
            start += ROWS
        tl.debug_barrier()
        tl.atomic_or(tree_ptr + root * n_words + row // 32, 1 << (row % 32), mask=is_core)
        tl.debug_barrier()
        n_outside = n_outside * 0
        start = 0
        while start < n_rows:
            r = start + tl.arange(0, ROWS)
            in_rows = r < n_rows
            core = in_rows & (tl.load(degree_ptr + r, mask=in_rows, other=0) >= min_samples)
            loaded = core[:, None] & used_word[None, :]
            near = tl.load(bits_ptr + r[:, None] * n_words + word[None, :], mask=loaded, other=0) & core_word[None, :]
            mine = tl.load(root_ptr + r, mask=core, other=0)
            tree = tl.load(tree_ptr + mine[:, None] * n_words + word[None, :], mask=loaded, other=0)
            other = lowest_bit(near & ~tree, word)
            touches = core & (other < n_rows)
            theirs = tl.load(root_ptr + other, mask=touches, other=0)
            tl.atomic_min(hook_ptr + tl.maximum(mine, theirs), tl.minimum(mine, theirs), mask=touches)
            n_outside += tl.sum(touches.to(tl.int32), axis=0)
            start += ROWS
        tl.debug_barrier()
        hook = tl.load(hook_ptr + row, mask=row < n_rows, other=0)
        hook = tl.where(row < n_rows, hook, row)
        for _ in tl.static_range(LOG_BLOCK_R):
            hook = tl.gather(hook, hook, 0)
        root = tl.gather(hook, root, 0)

    # The trees of the last round are the clusters, and their masks stand.
    is_root = (is_core & (root == row)).to(tl.int32)
    cluster = tl.gather(tl.cumsum(is_root, axis=0) - 1, root, 0)
    channel = tl.load(member_ptr + row, mask=row < n_rows, other=0)
    tl.store(labels_ptr + channel, cluster, mask=is_core)
    tl.debug_barrier()
    tl.store(hook_ptr + row, cluster, mask=row < n_rows)
    tl.debug_barrier()
    start = 0
    while start < n_rows:
        r = start + tl.arange(0, ROWS)
        in_rows = r < n_rows
        border = in_rows & (tl.load(degree_ptr + r, mask=in_rows, other=0) < min_samples)
        loaded = border[:, None] & used_word[None, :]
        near = tl.load(bits_ptr + r[:, None] * n_words + word[None, :], mask=loaded, other=0) & core_word[None, :]
        lowest = tl.full([ROWS], LARGEST_INT32, tl.int32)
        left = tl.max(tl.max((near != 0).to(tl.int32), axis=1), axis=0)
        while left > 0:
            # One adjacent cluster a turn: note its number, then take all of its channels out.
            other = lowest_bit(near, word)
            touches = other < n_rows
            lowest = tl.minimum(lowest, tl.load(hook_ptr + other, mask=touches, other=LARGEST_INT32))
            theirs = tl.load(root_ptr + other, mask=touches, other=0)
            gone = touches[:, None] & used_word[None, :]
            near = near & ~tl.load(tree_ptr + theirs[:, None] * n_words + word[None, :], mask=gone, other=0)
            left = tl.max(tl.max((near != 0).to(tl.int32), axis=1), axis=0)
        c = tl.load(member_ptr + r, mask=border, other=0)
        tl.store(labels_ptr + c, tl.where(lowest < LARGEST_INT32, lowest, NOISE), mask=border)
        start += ROWS


def connected_components(bits, degree, member, n_rows, min_samples, fraction, below, above, eps_floor, labels, tile):
    """Write the cluster labels into ``labels`` int32 (B, C) and return eps float32 (B,).

    Args:
        bits, degree, below, above: as `adjacency` left them.
        member: int32 (B, max_rows), the clustered channels; n_rows int32 (B,), how many there are.
        min_samples: int32 (max_rows + 1,), fraction float32 (max_rows + 1,): for every number of rows.
        tile: side of the tiles that the masks were made in.
    """
    batch, max_rows, n_words = bits.shape
    options = {"dtype": torch.int32, "device": bits.device}
    tree = torch.empty(batch, max_rows, n_words, **options)
    root, hook = torch.empty(2, batch, max_rows, **options)
    eps = torch.empty(batch, dtype=torch.float32, device=bits.device)
    block_r = max(next_power_of_2(max_rows), tile)
    # At most 64 or 128 rows a step: with more, and short ones, some versions of the compiler spill a register or two.
    connected_components_kernel[(batch,)](
        bits,
        degree,
        member,
        n_rows,
        min_samples,
        fraction,
        below,
        above,
        tree,
        root,
        hook,
        labels,
        eps,
        eps_floor,
        labels.shape[1],
        max_rows,
        n_words,
        TILE=tile,
        ROWS=min(WORDS_PER_STEP // (block_r // 32), 64 if block_r <= 256 else 128),
        BLOCK_R=block_r,
        LOG_BLOCK_R=block_r.bit_length() - 1,
        num_warps=16,
    )
    return eps

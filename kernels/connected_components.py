"""DBSCAN's labels from the bit masks: components of the core channels, numbered as scikit-learn does; eps; and weights.

One program an image labels its channels, and weighs them (see `channel_weights`); of one class it also adds up the
weighted activations. In small batches, whose time is that of one program, several programs share the cells of an image,
or its classes: each finds the labels anew, in scratch of its own, which costs nothing where multiprocessors are idle,
and saves a launch that would wait for the labels.

Trees grow by hooking: first every core points at its smallest core neighbour; then, while there
is more than one tree, in rounds every core with a neighbour outside its own tree hooks the larger root of the two under
the smaller one, until no core has any. The cores outside of a tree are a mask, so that a look for them is one AND of 32
channels, and only the first word that is not 0 is looked at closer. Roots are the smallest of their trees, so that the
order of the roots is the order of scikit-learn's clusters; a border channel takes the lowest-numbered cluster among its
core neighbours. The result does not depend on the order of execution: hooking takes minima, masks are exclusive ORs.

Floor: R^2 / 8 bytes read for the first hooks and twice that a round, of which a dense graph needs none; for the weights
3 * C reads and C writes a class, and C * h * w reads for the sums.
"""

import torch
import triton
import triton.language as tl

from cfcam_gpu.kernels.channel_weights import weights_of
from cfcam_gpu.kernels.constants import LARGEST_FLOAT32_BITS, LARGEST_INT32, NOISE
from cfcam_gpu.kernels.launch import cdiv, next_power_of_2

PROGRAMS = 132
"""Programs of a launch that share the cells or the classes of a small batch: one a multiprocessor, which they fill."""

MOST_ROWS = 2048
"""Most rows of programs that weigh: of more, what weights and sums need would not fit into the registers."""

VALUES_AT_ONCE = 8192
"""Of the activations that a program weighs in one step."""

FEW_CELLS, MANY_CELLS = 4, 16
"""Cells that it adds up at a time: more, if it has more to do than the first number, for fewer sums across threads."""

ROWS = {64: 64, 128: 128, 256: 256, 512: 256, 1024: 256, 2048: 128, 4096: 16}
"""Rows of one step of a loop over rows, for every block of rows: what the registers hold."""

REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
"""All that 16 warps can have: left to itself, the CUDA assembler takes fewer, for a second program, and spills some."""

CHUNK = tl.constexpr(16)
"""Words of a row in such a step."""


@triton.jit
def lowest_bit(words):
    """Position of the lowest set bit of each word, which is not 0."""
    # The lowest bit alone is a power of two, whose float32 exponent is its position.
    alone = (words & (-words)).to(tl.uint32, bitcast=True).to(tl.float32)
    return (alone.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def first_words(bits_ptr, mask_ptr, mask_row, in_rows, start, n_used, ROWS: tl.constexpr, N_WORDS: tl.constexpr):
    """Of the rows from ``start`` on, the first word that has a bit of the row's mask; N_WORDS where none has."""
    row = start + tl.arange(0, ROWS)
    first = tl.full([ROWS, CHUNK], N_WORDS, tl.int32)
    # From the last word to the first, so that the first to be found is what stays.
    for step in tl.static_range((N_WORDS + CHUNK - 1) // CHUNK):
        word = (N_WORDS + CHUNK - 1) // CHUNK * CHUNK - CHUNK * (step + 1) + tl.arange(0, CHUNK)
        wanted = in_rows[:, None] & (word < n_used)[None, :]
        near = tl.load(bits_ptr + row[:, None] * N_WORDS + word[None, :], mask=wanted, other=0)
        mask = tl.load(mask_ptr + mask_row[:, None] * N_WORDS + word[None, :], mask=wanted, other=0)
        first = tl.where((near & mask) != 0, word[None, :], first)
    return tl.min(first, axis=1)


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
    others_ptr,
    core_ptr,
    scratch_ptr,
    found_ptr,
    labels_ptr,
    eps_ptr,
    plain_ptr,
    filtered_ptr,
    weights_ptr,
    transposed_ptr,
    sums_ptr,
    eps_floor,
    n_channels,
    n_classes,
    n_cells,
    COPY: tl.constexpr,
    WEIGH: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SUM: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    N_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOG_BLOCK_R: tl.constexpr,
):
    # The parts are few: the second axis, which ends at 65535, is theirs. A division would take registers.
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    program = part * tl.num_programs(0) + image
    bits_ptr += image * MAX_ROWS * N_WORDS
    others_ptr += program * MAX_ROWS * N_WORDS
    core_ptr += program * N_WORDS
    degree_ptr += image * MAX_ROWS
    member_ptr += image * MAX_ROWS
    # Known distances between them: one address of a row serves for all five.
    root_ptr = scratch_ptr + program * 5 * MAX_ROWS
    tree_ptr = root_ptr + MAX_ROWS
    first_ptr = root_ptr + 2 * MAX_ROWS
    hook_ptr = root_ptr + 3 * MAX_ROWS
    word_ptr = root_ptr + 4 * MAX_ROWS
    # Every part has labels and weights of its own, to be read again: when the others write theirs is not defined.
    labels_ptr += program * n_channels
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
    tl.store(eps_ptr + image, tl.maximum(eps, eps_floor), mask=part == 0)

    row = tl.arange(0, BLOCK_R)
    in_image = row < n_rows
    # Of one row alone no neighbours were written.
    n_used = tl.where(n_rows > 1, tl.cdiv(n_rows, TILE) * (TILE // 32), 0)
    is_core = in_image & (tl.load(degree_ptr + row, mask=in_image, other=0) >= min_samples)
    word = tl.arange(0, BLOCK_R // 32)
    core_bits = tl.reshape(is_core.to(tl.int32), [BLOCK_R // 32, 32]) << tl.arange(0, 32)[None, :]
    core_word = tl.sum(core_bits, axis=1)
    tl.store(core_ptr + word, core_word, mask=word < N_WORDS)
    if COPY:  # a single part writes where it finds them
        channel = tl.arange(0, BLOCK_C)
        in_channels = channel < n_channels
        found = tl.load(found_ptr + image * n_channels + channel, mask=in_channels, other=NOISE)
        tl.store(labels_ptr + channel, found, mask=in_channels)
    tl.debug_barrier()

    # The smallest core neighbour of every row: a core's tree hooks there, a border row's first cluster is there.
    start = 0
    while start < n_rows:
        r = start + tl.arange(0, ROWS)
        first_word = first_words(bits_ptr, core_ptr, r * 0, r < n_rows, start, n_used, ROWS, N_WORDS)
        tl.store(word_ptr + r, first_word, mask=r < n_rows)
        start += ROWS
    tl.debug_barrier()
    found = tl.load(word_ptr + row, mask=in_image, other=N_WORDS)
    reaches = in_image & (found < N_WORDS)
    near = tl.load(bits_ptr + row * N_WORDS + found, mask=reaches, other=0)
    near &= tl.load(core_ptr + found, mask=reaches, other=0)
    first = tl.where(reaches, found * 32 + lowest_bit(near), row)
    # What a round needs of it is read again: held in registers over the rounds, some of them would be spilled.
    tl.store(first_ptr + row, first, mask=in_image)
    root = tl.where(is_core, first, row)
    for _ in tl.static_range(LOG_BLOCK_R):
        root = tl.gather(root, root, 0)

    # Of each tree the cores outside of it, as a mask; and of each row the first word that has one of them.
    n_trees = tl.sum((is_core & (root == row)).to(tl.int32), axis=0)
    looked = n_trees > 1
    n_hooks = n_trees - 1
    while n_hooks > 0:
        first = tl.load(first_ptr + row, mask=in_image, other=0)
        tree = tl.where(is_core | (first != row), tl.gather(root, first, 0), -1)
        tl.store(tree_ptr + row, tree, mask=in_image)
        tl.store(root_ptr + row, tl.where(is_core, root, -1), mask=in_image)
        tl.store(hook_ptr + row, row, mask=in_image)
        tl.debug_barrier()
        start = 0
        while start < n_rows:
            r = start + tl.arange(0, ROWS)
            is_root = tl.load(root_ptr + r, mask=r < n_rows, other=-1) == r
            for step in tl.static_range((N_WORDS + CHUNK - 1) // CHUNK):
                w = step * CHUNK + tl.arange(0, CHUNK)
                every = tl.broadcast_to(tl.load(core_ptr + w, mask=w < n_used, other=0)[None, :], [ROWS, CHUNK])
                written = is_root[:, None] & (w < n_used)[None, :]
                tl.store(others_ptr + r[:, None] * N_WORDS + w[None, :], every, mask=written)
            start += ROWS
        tl.debug_barrier()
        tl.atomic_xor(others_ptr + root * N_WORDS + row // 32, 1 << (row % 32), mask=is_core, sem="relaxed")
        tl.debug_barrier()
        start = 0
        while start < n_rows:
            r = start + tl.arange(0, ROWS)
            in_tree = tl.load(tree_ptr + r, mask=r < n_rows, other=-1)
            first_word = first_words(bits_ptr, others_ptr, in_tree, in_tree >= 0, start, n_used, ROWS, N_WORDS)
            tl.store(word_ptr + r, first_word, mask=r < n_rows)
            start += ROWS
        tl.debug_barrier()
        outside = tl.load(word_ptr + row, mask=is_core, other=N_WORDS)
        touches = is_core & (outside < N_WORDS)
        near = tl.load(bits_ptr + row * N_WORDS + outside, mask=touches, other=0)
        near &= tl.load(others_ptr + root * N_WORDS + outside, mask=touches, other=0)
        theirs = tl.gather(root, tl.where(touches, outside * 32 + lowest_bit(near), row), 0)
        tl.atomic_min(hook_ptr + tl.maximum(root, theirs), tl.minimum(root, theirs), mask=touches, sem="relaxed")
        n_hooks = tl.sum(touches.to(tl.int32), axis=0)
        tl.debug_barrier()
        hook = tl.load(hook_ptr + row, mask=in_image, other=0)
        hook = tl.where(in_image, hook, row)
        for _ in tl.static_range(LOG_BLOCK_R):
            hook = tl.gather(hook, hook, 0)
        root = tl.gather(hook, root, 0)
        n_trees = tl.sum((is_core & (root == row)).to(tl.int32), axis=0)
        n_hooks = tl.where(n_trees > 1, n_hooks, 0)
        tl.debug_barrier()

    # The trees of the last round are the clusters; of those that a border row is near to, it takes the first.
    is_root = (is_core & (root == row)).to(tl.int32)
    cluster = tl.gather(tl.cumsum(is_root, axis=0) - 1, root, 0)
    first = tl.load(first_ptr + row, mask=in_image, other=0)
    reaches = in_image & (is_core | (first != row))
    several = reaches & (tl.load(word_ptr + row, mask=in_image & looked & (n_trees > 1), other=N_WORDS) < N_WORDS)
    channel = tl.load(member_ptr + row, mask=in_image, other=0)
    label = tl.where(reaches, tl.gather(cluster, first, 0), NOISE)
    tl.store(labels_ptr + channel, label, mask=in_image & (~several))
    n_several = tl.sum(several.to(tl.int32), axis=0)
    if n_several > 0:
        tl.debug_barrier()
        tl.store(hook_ptr + tl.cumsum(several.to(tl.int32), axis=0) - 1, row, mask=several)
        tl.store(first_ptr + row, cluster, mask=in_image)
        tl.debug_barrier()
        start = 0
        while start < n_several:
            listed = start + tl.arange(0, WIDE_ROWS)
            r = tl.load(hook_ptr + listed, mask=listed < n_several, other=0)
            wanted = (listed < n_several)[:, None] & (word < n_used)[None, :]
            masks = tl.load(bits_ptr + r[:, None] * N_WORDS + word[None, :], mask=wanted, other=0) & core_word[None, :]
            lowest = tl.full([WIDE_ROWS], LARGEST_INT32, tl.int32)
            left = tl.max(tl.max((masks != 0).to(tl.int32), axis=1), axis=0)
            while left > 0:
                # One adjacent cluster a turn: note its root, then take all of its channels out.
                position = tl.where(masks != 0, word[None, :] * 32 + lowest_bit(masks), LARGEST_INT32)
                other = tl.min(position, axis=1)
                adjacent = other < n_rows
                their_root = tl.load(root_ptr + other, mask=adjacent, other=0)
                lowest = tl.where(adjacent, tl.minimum(lowest, their_root), lowest)
                kept = adjacent[:, None] & (word < n_used)[None, :]
                masks &= tl.load(others_ptr + their_root[:, None] * N_WORDS + word[None, :], mask=kept, other=0)
                left = tl.max(tl.max((masks != 0).to(tl.int32), axis=1), axis=0)
            c = tl.load(member_ptr + r, mask=listed < n_several, other=0)
            cluster_of = tl.load(first_ptr + lowest, mask=listed < n_several, other=0)
            tl.store(labels_ptr + c, cluster_of, mask=listed < n_several)
            start += WIDE_ROWS

    if WEIGH:
        tl.debug_barrier()
        channel = tl.arange(0, BLOCK_C)
        in_channels = channel < n_channels
        label = tl.load(labels_ptr + channel, mask=in_channels, other=NOISE)
        first_class = image * n_classes * n_channels
        plain_ptr += first_class
        filtered_ptr += first_class
        n_parts = tl.num_programs(1)
        if SUM:
            weights_ptr += program * n_channels
            weights = weights_of(label, plain_ptr, filtered_ptr, channel, in_channels, SOFTMAX)
            tl.store(weights_ptr + channel, weights, mask=in_channels)
            tl.debug_barrier()
            transposed_ptr += image * n_cells * n_channels
            first_cell = part * CELLS
            while first_cell < n_cells:
                cell = first_cell + tl.arange(0, CELLS)
                # Added up over the channels behind the loop: in it, every sum would be across threads.
                sums = tl.zeros([CELLS, CHANNELS], tl.float32)
                start = 0
                while start < n_channels:
                    c = start + tl.arange(0, CHANNELS)
                    inside = (cell < n_cells)[:, None] & (c < n_channels)[None, :]
                    value = tl.load(transposed_ptr + cell[:, None] * n_channels + c[None, :], mask=inside, other=0.0)
                    sums += value * tl.load(weights_ptr + c, mask=c < n_channels, other=0.0)[None, :]
                    start += CHANNELS
                total = tl.sum(sums, axis=1)
                if RELU:
                    total = tl.maximum(total, 0.0)
                tl.store(sums_ptr + image * n_cells + cell, total, mask=cell < n_cells)
                first_cell += n_parts * CELLS
        else:
            weights_ptr += first_class
            k = part
            while k < n_classes:
                of_class = k * n_channels
                weights = weights_of(
                    label, plain_ptr + of_class, filtered_ptr + of_class, channel, in_channels, SOFTMAX
                )
                tl.store(weights_ptr + of_class + channel, weights, mask=in_channels)
                k += n_parts


def connected_components(
    bits,
    degree,
    member,
    n_rows,
    min_samples,
    fraction,
    below,
    above,
    eps_floor,
    labels,
    tile,
    pooled=None,
    softmax=False,
    transposed=None,
    relu=False,
):
    """The cluster labels; eps; and, if asked for and there are at most `MOST_ROWS` rows, weights and weighted sums.

    Args:
        bits, degree, below, above: as `adjacency` left them.
        member: int32 (B, max_rows), the clustered channels; n_rows int32 (B,), how many there are.
        min_samples: int32 (max_rows + 1,), fraction float32 (max_rows + 1,): for every number of rows.
        labels: int32 (B, C), DOMINANT or NOISE, as `dominant_channels` left them; they may be overwritten.
        tile: side of the tiles that the masks were made in.
        pooled: the pooled gradients plain and filtered, float32 (B, C) or (B, K, C), contiguous; None: no weights.
        softmax: as in `channel_weights`.
        transposed: float32 (B, h * w, C), whose sums weighted by weights (B, C) are wanted; None: no sums.
        relu: the sums' positive parts alone.

    Returns:
        labels int32 (B, C), eps float32 (B,), weights as the pooled gradients or None, sums float32 (B, h * w) or None.
    """
    batch, max_rows, n_words = bits.shape
    n_channels = labels.shape[1]
    block_r = max(next_power_of_2(max_rows), tile)
    if block_r > MOST_ROWS:
        pooled = transposed = None
    block_c = next_power_of_2(n_channels)
    options = {"dtype": torch.int32, "device": bits.device}
    floats = {"dtype": torch.float32, "device": bits.device}
    n_classes, n_cells, to_share = 1, 1, 1
    weights = sums = None
    # Pointers that the kernel never follows, where there is nothing to weigh or to add up.
    plain = filtered = below
    if pooled is not None:
        plain, filtered = pooled
        n_classes = to_share = plain.numel() // labels.numel()
    if transposed is not None:
        n_cells = transposed.shape[1]
        sums = torch.empty(batch, n_cells, **floats)
        to_share = cdiv(n_cells, FEW_CELLS)
    n_parts = min(to_share, max(PROGRAMS // batch, 1))
    others = torch.empty(n_parts, batch, max_rows, n_words, **options)
    core = torch.empty(n_parts, batch, n_words, **options)
    scratch = torch.empty(n_parts, batch, 5, max_rows, **options)
    eps = torch.empty(batch, **floats)
    written = labels[None] if n_parts == 1 else torch.empty(n_parts, batch, n_channels, **options)
    if pooled is not None:
        weights = torch.empty(n_parts if transposed is not None else 1, *plain.shape, **floats)
    at_once = FEW_CELLS if n_cells <= n_parts * FEW_CELLS else MANY_CELLS
    connected_components_kernel[(batch, n_parts)](
        bits,
        degree,
        member,
        n_rows,
        min_samples,
        fraction,
        below,
        above,
        others,
        core,
        scratch,
        labels,
        written,
        eps,
        plain,
        filtered,
        below if weights is None else weights,
        below if transposed is None else transposed,
        below if sums is None else sums,
        eps_floor,
        n_channels,
        n_classes,
        n_cells,
        COPY=n_parts > 1,
        WEIGH=pooled is not None,
        SOFTMAX=softmax,
        SUM=transposed is not None,
        RELU=relu,
        BLOCK_C=block_c,
        CELLS=at_once,
        CHANNELS=min(block_c, VALUES_AT_ONCE // at_once),
        MAX_ROWS=max_rows,
        N_WORDS=n_words,
        TILE=tile,
        ROWS=ROWS[block_r],
        WIDE_ROWS=max(1, min(4096 // (block_r // 32), 64)),
        BLOCK_R=block_r,
        LOG_BLOCK_R=block_r.bit_length() - 1,
        num_warps=16,
        enable_fp_fusion=False,
        **REGISTERS,
    )
    return written[0], eps, None if weights is None else weights[0], sums

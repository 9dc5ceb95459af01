"""The two labels that are not cluster numbers."""

DOMINANT = -2
"""A channel that keeps its own gradient and skips clustering."""

NOISE = -1
"""A channel outside every cluster: its weight is 0."""

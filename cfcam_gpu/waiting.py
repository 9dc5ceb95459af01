"""How the threads of a forward pass wait for each other in ``cfcam explain``; it is to come before torch."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def sleep_in_the_command(argv: Sequence[str] = sys.argv, started: Sequence[str] = sys.orig_argv) -> None:
    """Have OpenMP's threads sleep when they wait, in this process, if it is ``cfcam explain``.

    As they are, they spin for milliseconds after each layer, on the cores on which others read and write pictures at
    the same time. OpenMP reads the variable when torch loads it, so that nothing later can do this. A value that is set
    already stays.

    Args:
        argv: `sys.argv`; of a module that is being started, its first is "-m".
        started: `sys.orig_argv`.
    """
    module = started[started.index("-m") + 1 :][:1] if argv[:1] == ["-m"] else []
    if argv[1:2] == ["explain"] and (module == ["cfcam_gpu"] or Path(argv[0]).stem == "cfcam"):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

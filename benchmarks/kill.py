"""Runs ``cfcam`` again and again, kills it at random moments, and lets it finish in the end.

    python benchmarks/kill.py KILLS SEED explain photos/ --out maps --write maps

Prints a line of JSON: the seconds of an undisturbed run into OUT-undisturbed, the kills and after how many seconds they
came, and how often the command had ended before.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Imported once, here: a process of its own would take seconds to begin.
import matplotlib  # noqa: F401
import PIL.Image  # noqa: F401
import torch  # noqa: F401
import tqdm  # noqa: F401

from cfcam_gpu import CFCAM, cli  # noqa: F401


def started(args):
    """A process that runs ``cfcam ARGS`` and is silent."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            status = cli.main(args)
        finally:
            os._exit(status)
    return process


def ended(process):
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(n_kills, seed, *args):
    args, draw = list(args), random.Random(int(seed))
    out = args.index("--out") + 1
    begun = time.perf_counter()
    undisturbed = started([*args[:out], f"{args[out]}-undisturbed", *args[out + 1 :]])
    status = os.waitstatus_to_exitcode(os.waitpid(undisturbed, 0)[1])
    seconds = time.perf_counter() - begun
    kills, ended_before = [], 0
    while len(kills) < int(n_kills):
        process = started(args)
        moment = draw.uniform(0, 1.2 * seconds)
        begun = time.perf_counter()
        while time.perf_counter() - begun < moment and not ended(process):
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        killed = os.waitpid(process, 0)[1] == signal.SIGKILL
        if killed:
            kills.append(round(moment, 3))
        else:
            ended_before += 1
    last = os.waitstatus_to_exitcode(os.waitpid(started(args), 0)[1])
    print(json.dumps({"seconds": seconds, "kills": kills, "ended_before": ended_before, "statuses": [status, last]}))


if __name__ == "__main__":
    main(*sys.argv[1:])

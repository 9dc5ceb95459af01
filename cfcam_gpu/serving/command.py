"""``cfcam serve``: its options, and what it starts."""

import argparse
from dataclasses import fields

from cfcam_gpu import serving

ENGINE = ("labels", "multilabel", "layer", "method", "paper", "backend", "device")
"""Options that say how a picture is explained, by their names in `datasets.Options`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The address and the limits."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    add("--port", type=_whole, default=8000, metavar="N", help="0: any that is free (default: %(default)s)")
    add("--grace-s", type=_whole, default=30, metavar="S", help="after SIGTERM, for what has begun (default: 30)")
    for limit in fields(serving.Limits):
        about = limit.metadata
        add(
            f"--{limit.name.replace('_', '-')}",
            type=_whole if limit.type in (int, "int") else _number,
            default=limit.default,
            metavar=about["unit"],
            help=f"{about['about']} (default: %(default)s)",
        )


def _whole(text):
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")
    return int(text)


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Serve what the arguments say; the exit status."""
    limits = serving.Limits(**{limit.name: getattr(args, limit.name) for limit in fields(serving.Limits)})
    engine = serving.Engine(args.model, **{name: getattr(args, name) for name in ENGINE})
    print("\n".join(engine.notes), flush=True)
    return serving.serve(engine, limits, args.host, args.port, args.grace_s)

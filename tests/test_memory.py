"""Peak extra memory, measured in a fresh process: bounded per image in flight, whatever the size of the batch, and
whatever the number of classes."""

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

MEASURE = r"""
import re, sys
import torch
sys.path.insert(0, {root!r})
from cfcam_gpu import CFCAM, CFCAMConfig, cf_cam, layers
# Not ru_maxrss: a child's starts at its parent's peak.
peak_mib = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
{setup}
{warm_up}  # code and thread pools
before = peak_mib()
{call}
print(peak_mib() - before)
"""


LIMIT_MIB = 120

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")


def output_of(environment, **script):
    script = MEASURE.format(root=str(Path(__file__).resolve().parents[1]), **script)
    environment = {**os.environ, **environment}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return result.stdout


def peak_extra_mib(**script):
    return float(output_of({}, **script))


# 1536 channels to cluster, as published, and 1024, the default: the batched form holds several matrices of them at
# once, and where the system hands out memory in huge pages, 1536 may reach 124 MiB.
@pytest.mark.parametrize("engine, batch, percentile", [("auto", 24, 75.0), ("batched", 1, 50.0)])
def test_peak_extra_memory(engine, batch, percentile):
    setup = f"""
config = CFCAMConfig(dominant_percentile={percentile})
activations = torch.rand({batch}, 2048, 7, 7).sub_(0.5).relu_()
gradients = torch.randn({batch}, 2048, 7, 7)
"""
    extra_mib = peak_extra_mib(
        setup=setup,
        warm_up=f"cf_cam(activations[:1, :64], gradients[:1, :64], (8, 8), config, clustering={engine!r})",
        call=f"cf_cam(activations, gradients, (8, 8), config, clustering={engine!r})",
    )
    print(f"{engine}, batch {batch}: {extra_mib:.0f} MiB")
    # Who is near whom among 1536 channels is 2.3 MiB alone: less would mean that nothing was measured.
    assert 2 < extra_mib < LIMIT_MIB


def test_a_thousand_classes():
    """The maps, and little beside them: the gradients of all would take twice as much as the maps."""
    setup = """
nn = torch.nn
head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)
model = nn.Sequential(nn.Conv2d(3, 2048, 3, 32, 1), *head).eval()
cam, images = CFCAM(model, [model[0]]), torch.rand(1, 3, 192, 192)
"""
    of_maps, of_gradients = (1000 * n * 4 / 2**20 for n in (192 * 192, 2048 * 6 * 6))
    extra_mib = peak_extra_mib(setup=setup, warm_up="cam.maps(images, top=2)", call="cam.maps(images, top=1000)")
    print(f"a thousand classes: {extra_mib:.0f} MiB, of which maps {of_maps:.0f}; gradients {of_gradients:.0f}")
    assert of_maps / 2 < extra_mib < of_maps + 110 < of_gradients


def test_finding_the_layer_and_its_guide():
    """Hardly more than the forward pass: what a pass looks at is let go of."""
    setup = """
torch.manual_seed(0)
torch.set_num_threads(1)
nn = torch.nn
class Stage(nn.Sequential):  # 8 MiB for the smaller sides, as for the larger
    def __init__(self, channels):
        part = lambda: nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 1, groups=channels), nn.ReLU()))
        super().__init__(nn.Conv2d(channels // 4, channels, 2, 2), part(), part())
body = nn.Sequential(nn.Conv2d(3, 8, 1), *(Stage(8 * 4**power) for power in range(1, 5)))
model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 5)).eval()
images = torch.rand(1, 3, 512, 512)
def forward(images):
    with torch.no_grad():
        return model(images)
"""
    calls = """
extra = {}
for name, call in {
    "forward": lambda: forward(images),
    "choice": lambda: layers.inspect_target_layer(model, images),
    "map": lambda: CFCAM(model, [body], guide_layer=None).maps(images),
    "map and guide": lambda: CFCAM(model, [body]).maps(images),
}.items():
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
    before = peak_mib()
    call()
    extra[name] = peak_mib() - before
print(extra)
"""
    # The tensors' own memory, without what the allocator keeps for others of the same sizes.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    warm_up = "forward(images[..., :64, :64]); CFCAM(model).maps(images[..., :64, :64])"
    printed = output_of(environment, setup=setup, warm_up=warm_up, call=calls)
    print(printed)
    extra = literal_eval(printed.splitlines()[0])
    plain = max(extra["forward"], extra["map"])  # the system counts not quite every page
    assert plain > 14, "two outputs at least"
    assert extra["choice"] < 1.2 * plain + 4
    assert extra["map and guide"] < 1.2 * plain + 4

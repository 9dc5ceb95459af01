"""Kernel benchmarks on a GPU: the pipeline by batch, each kernel against its floor, `CFCAM.capture` end to end, and the
accelerated GradCAM against pytorch-grad-cam's.

    python benchmarks/kernels.py --out results/

Times are medians of CUDA-event timings over graph replays, after warm-up; a small batch stays in the cache, as it does
behind a network's last layer. Only the rows of GradCAM are wall clock, a call each from the images to NumPy maps on the
host. Outputs are compared with the torch backend's, or the other library's, first: no agreement, no number. One JSON
line per point is appended to kernels.jsonl; a short table is printed last.
"""

import argparse
import statistics
import time
from pathlib import Path

import rows
import torch

from cfcam_gpu import CFCAM, CFCAMConfig, accelerate, torch_backend, triton_backend
from cfcam_gpu.clustering.ranks import dominant_rank
from cfcam_gpu.kernels.class_map import weighted_sum_kernel

COPY_BYTES_PER_SECOND = 4.3e12
"""Measured device-to-device copy of an H200, bytes read plus written: the ceiling for moving bytes."""

FLOAT32_OPERATIONS_PER_SECOND = 67e12
"""Plain float32 of an H200 by its datasheet, a multiply-add counted as two."""


PRESETS = {"default": CFCAMConfig(), "published": CFCAMConfig.paper()}


def floor_us(batch, n_channels, n_cells, n_pixels, itemsize, config):
    """The larger of the two times below which no version of the pipeline can run, in microseconds."""
    n_rows = dominant_rank(n_channels, config.dominant_percentile)
    operations = batch * 1.5 * n_rows**2 * n_cells
    moved = batch * (2 * n_channels * n_cells * itemsize + 4 * n_pixels)
    if config.averages:  # a guide of half the channels and four times the cells; each pair of its cells once
        moved += batch * 2 * n_channels * n_cells * itemsize
        operations += batch * n_channels / 2 * (4 * n_cells) ** 2
    return 1e6 * max(operations / FLOAT32_OPERATIONS_PER_SECOND, moved / COPY_BYTES_PER_SECOND)


def time_us(functions, rounds=30):
    """Median, p20 and p80 in microseconds of graph replays of each function, interleaved."""
    graphs = []
    for function in functions:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graphs.append(graph)
    times = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, of_graph in zip(graphs, times):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            graph.replay()
            events[0].record()
            for _ in range(10):
                graph.replay()
            events[1].record()
            events[1].synchronize()
            of_graph.append(1e3 * events[0].elapsed_time(events[1]) / 10)
    return [quantiles(of_graph) for of_graph in times]


def wall_us(functions, rounds):
    """Median, p20 and p80 in microseconds of calls that end on the host, interleaved."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, of_function in zip(functions, times):
            start = time.perf_counter()
            function()
            of_function.append(1e6 * (time.perf_counter() - start))
    return [quantiles(of_function) for of_function in times]


def quantiles(values):
    """Median, p20 and p80."""
    tenths = statistics.quantiles(values, n=10)
    return tenths[4], tenths[1], tenths[7]


def problem(batch, n_channels, side, dtype):
    """Activations and gradients (B, C, h, w), and a guide (B, C / 2, 2h, 2w) as a ResNet's stage before has it."""
    activations = torch.randn(batch, n_channels, side, side, device="cuda").relu_()
    activations *= torch.rand(batch, n_channels, 1, 1, device="cuda")
    gradients = torch.randn_like(activations) * 1e-3
    guide = torch.randn(batch, n_channels // 2, 2 * side, 2 * side, device="cuda").relu_()
    return activations.to(dtype), gradients.to(dtype), guide.to(dtype)


def check(activations, gradients, guide, config):
    """The kernels' maps against the torch backend's, where the labels agree."""
    few = [tensor[:2] for tensor in (activations, gradients, guide)]
    maps, labels, _, _ = triton_backend.cf_cam(*few[:2], (224, 224), config, "batched", few[2])
    few = [tensor.cpu() for tensor in few]
    expected = torch_backend.cf_cam(*few[:2], (224, 224), config, "host", few[2])
    same = (labels.cpu() == expected[1]).all(1)
    assert same.any(), "labels differ in every image"
    torch.testing.assert_close(maps.cpu()[same], expected[0][same], rtol=0, atol=1e-4)


def pipeline_rows(shapes, preset="default"):
    config = PRESETS[preset]
    for batch, n_channels, side, dtype in shapes:
        activations, gradients, guide = problem(batch, n_channels, side, dtype)
        check(activations, gradients, guide, config)
        arguments = activations, gradients, (224, 224), config, "batched", guide
        median, p20, p80 = time_us([lambda arguments=arguments: triton_backend.cf_cam(*arguments)])[0]
        least = floor_us(batch, n_channels, side * side, 224 * 224, activations.element_size(), config)
        yield {
            "op": "pipeline",
            "preset": preset,
            "shape": [batch, n_channels, side, side],
            "dtype": str(dtype),
            "median_us": median,
            "p20_us": p20,
            "p80_us": p80,
            "maps_per_s": 1e6 * batch / median,
            "floor_us": least,
            "share_of_floor": least / median,
        }


def kernel_rows(shapes, n_classes=None):
    """Each launch of a pipeline, timed alone by replaying it with the arguments that it had.

    With ``n_classes``, of so many classes of each image.
    """
    kernel_type = type(weighted_sum_kernel)
    original = kernel_type.run
    for batch, n_channels, side, dtype in shapes:
        launches = []

        def record(self, *args, launches=launches, **kwargs):
            # Copies from before the launch: repeating it adds to its counters, which the next kernel reads.
            copies = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in args)
            launches.append((self, copies, kwargs))
            return original(self, *args, **kwargs)

        kernel_type.run = record
        try:
            activations, gradients, guide = problem(batch, n_channels, side, dtype)
            if n_classes is not None:
                gradients = gradients[:, None] * torch.randn(1, n_classes, 1, 1, 1, device="cuda", dtype=dtype)
            triton_backend.cf_cam(activations, gradients, (224, 224), CFCAMConfig(), "batched", guide)
        finally:
            kernel_type.run = original
        for index, (kernel, args, kwargs) in enumerate(launches):
            median, p20, p80 = time_us([lambda k=kernel, a=args, kw=kwargs: original(k, *a, **kw)], rounds=10)[0]
            yield {
                "op": f"{index}:{kernel.fn.__name__}" + (f", {n_classes} classes" if n_classes else ""),
                "shape": [batch, n_channels, side, side],
                "dtype": str(dtype),
                "median_us": median,
                "p20_us": p20,
                "p80_us": p80,
            }


def end_to_end_rows(batches):
    try:
        from torchvision.models import resnet50
    except ImportError:
        print("torchvision is not installed: no end-to-end rows")
        return
    model = resnet50(weights=None).eval().cuda().half().to(memory_format=torch.channels_last)
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.half)
        images = images.to(memory_format=torch.channels_last)
        cam = CFCAM(model, [model.layer4[-1]])

        @torch.no_grad()
        def forward(images=images):
            model(images)

        calls = {
            "forward": forward,
            "CFCAM.capture": lambda cam=cam, images=images: cam.maps(images),
            "CFCAM.capture, ten classes": lambda cam=cam, images=images: cam.maps(images, top=10),
        }
        timed = time_us(list(calls.values()))
        for name, (median, p20, p80) in zip(calls, timed):
            yield {
                "op": f"resnet50:{name}",
                "shape": [batch, 3, 224, 224],
                "dtype": "torch.float16",
                "median_us": median,
                "p20_us": p20,
                "p80_us": p80,
                "ratio": median / timed[0][0],
            }


def scaling_rows(shapes):
    """pytorch-grad-cam's scaling and resize, by the kernel and by torch operations."""
    for batch, sides in shapes:
        grids = [torch.randn(batch, side, side, device="cuda").relu() for side in sides]
        functions = [lambda b=b, g=grids: b.grad_cam_maps(g, (224, 224)) for b in (triton_backend, torch_backend)]
        torch.testing.assert_close(functions[0](), functions[1](), rtol=0, atol=2e-6)
        timed = time_us(functions)
        for name, (median, p20, p80) in zip(("triton", "torch"), timed):
            yield {
                "op": f"grad_cam_maps:{name}",
                "shape": [batch, *sides],
                "dtype": "torch.float32",
                "median_us": median,
                "p20_us": p20,
                "p80_us": p80,
                "speedup": timed[1][0] / median,
            }


def grad_cam_rows(batches):
    """The accelerated GradCAM over pytorch-grad-cam's, a call from the images to NumPy maps."""
    try:
        import pytorch_grad_cam
        from torchvision.models import resnet50
    except ImportError as error:
        print(f"no rows of GradCAM: {error}")
        return
    model = resnet50(weights=None).eval().cuda()
    model.fc.weight.data.abs_()  # no map is zero, or the small difference of large sums
    slow = pytorch_grad_cam.GradCAM(model, [model.layer4[-1]])
    fast = accelerate(slow)
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        expected = torch.from_numpy(slow(images, None))
        assert (expected.amax((1, 2)) > 0.9).all(), "maps of zeros agree with everything"
        torch.testing.assert_close(torch.from_numpy(fast(images, None)), expected, rtol=0, atol=1e-4)
        timed = wall_us([lambda x=images: slow(x, None), lambda x=images: fast(x, None)], rounds=10)
        for name, (median, p20, p80) in zip(("pytorch-grad-cam", "accelerated"), timed):
            yield {
                "op": f"resnet50:GradCAM {name}",
                "shape": [batch, 3, 224, 224],
                "dtype": "torch.float32",
                "median_us": median,
                "p20_us": p20,
                "p80_us": p80,
                "speedup": timed[0][0] / median,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA or ROCm device")
    here = rows.about("triton", "grad-cam")
    half, single = torch.float16, torch.float32
    sources = (
        pipeline_rows([(batch, 2048, 7, single) for batch in (1, 8, 64, 256)]),
        pipeline_rows([(batch, 2048, 7, single) for batch in (1, 256)], "published"),
        pipeline_rows([(1, 512, 7, single), (1, 1280, 7, half), (256, 1280, 7, half), (64, 512, 14, single)]),
        kernel_rows([(1, 2048, 7, single), (64, 2048, 7, single)]),
        kernel_rows([(1, 2048, 7, single), (64, 2048, 7, single)], n_classes=10),
        scaling_rows([(1, [7]), (64, [7]), (64, [28, 14, 7])]),
        end_to_end_rows((1, 8, 64)),
        grad_cam_rows((64,)),
    )
    points = ({**row, **here} for source in sources for row in source)
    written = rows.write("kernels", points, out)
    print(here)
    for row in written:
        extra = {
            "maps_per_s": "{:,.0f} maps/s",
            "share_of_floor": "{:.0%} of floor",
            "ratio": "{:.3f} x forward",
            "speedup": "{:.2f} x the other's speed",
        }
        op = f"{row['op']}, {row['preset']}" if "preset" in row else row["op"]
        notes = "  ".join(text.format(row[key]) for key, text in extra.items() if key in row)
        print(f"{op:34s} {'x'.join(map(str, row['shape'])):18s} {row['median_us']:10.1f} us  {notes}")


if __name__ == "__main__":
    main()

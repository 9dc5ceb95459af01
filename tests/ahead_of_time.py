"""Compiles every kernel as the launchers launch it, for targets that need not be here; prints a JSON line for each.

The launchers run on meta tensors, and each launch is compiled instead of run, so that signatures and block sizes are
those of the product. Run it in a process without TRITON_INTERPRET:

    python tests/ahead_of_time.py cuda:90 hip:gfx942
    python tests/ahead_of_time.py --demanding cuda:80    # the kernels that differ most between targets, alone
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cfcam_gpu import CFCAMConfig, triton_backend
from cfcam_gpu.kernels.gaussian_filter import gaussian_filter

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


def gpu_target(name):
    backend, _, arch = name.partition(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def source_of(kernel, args, kwargs):
    """What a launch with these arguments compiles: types, constants, and alignment as the runtime would see it."""
    bound = dict(zip(kernel.arg_names, args))
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    bound.update((name, value) for name, value in kwargs.items() if name in kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = bound[name]
        if kernel.params[index].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1:  # the runtime specialises on it
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


def resources(compiled, target):
    """Registers and spilled bytes of a compiled kernel."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
            "spilled": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", text)[1]), "spilled": int(re.search(r"STACK:(\d+)", text)[1])}


def fused_sums(ptx, fusion):
    """How many sums across threads are fused with a product of the thread's own, or may be where ``fusion`` is on."""
    shuffled, products, fused = set(), set(), 0
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(.*);", line)
        if not found:
            continue
        operation, operands = found[1], re.findall(r"%\w+", found[2])
        if operation.startswith("shfl.sync"):
            shuffled.add(operands[0])
        elif operation.startswith("mov.b32") and len(operands) == 2:
            for kind in (shuffled, products):
                kind |= {operands[0]} & ({operands[0]} if operands[1] in kind else set())
        elif operation.startswith("mul") and operation.endswith("f32"):
            products.add(operands[0])
        elif operation.startswith(("fma.rn.f32", "add.f32", "add.rn.f32", "sub.f32")):
            across = any(operand in shuffled for operand in operands[1:])
            own = operation.startswith("fma") or (fusion and any(operand in products for operand in operands[1:]))
            fused += across and own
    return fused


SIZES = ("STRIDE", "N_STEPS")
"""Constants of a launch that are sizes."""


def launches(configurations):
    """A launch (kernel, source, options) of every block size, variant and dtype that the configurations make.

    Launches that differ in their sizes alone, and so in which of them are 1 or multiples of 16, count as one.
    """
    recorded = {}

    def record(kernel, *args, grid=None, warmup=False, **kwargs):
        source, options = source_of(kernel, args, kwargs)
        pointers = [kind for kind in source.signature.values() if kind.startswith("*")]
        variant = {name: value for name, value in kwargs.items() if name.isupper() and name not in SIZES}
        recorded.setdefault((kernel.__name__, str(pointers), str(variant), str(options)), (kernel, source, options))

    triton.runtime.jit.JITFunction.run = record
    for shape, dtype, config, guide in configurations:
        tensors = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(2)]
        guide = guide and torch.empty(guide, dtype=dtype, device="meta")
        triton_backend.cf_cam(*tensors, (224, 224), config, "batched", guide)
        if guide is not None or not config.averages:
            several = tensors[1][:, None].expand(-1, 10, -1, -1, -1)  # classes an image
            triton_backend.cf_cam(tensors[0], several, (224, 224), config, "batched", guide)
        if dtype == torch.float32:
            triton_backend.cluster_channels(tensors[0], config, "batched")
        layers = [torch.empty(shape[0], n, m, device="meta") for n, m in (shape[2:], shape[2:3] * 2, (7, 5))]
        for scale_mean in (True, False):
            triton_backend.grad_cam_maps(layers[:1], (224, 224), scale_mean)
            triton_backend.grad_cam_maps(layers, (224, 224), scale_mean)
        for weights in (tensors[0], tensors[0][:, :, 0, 0].float()):  # of a cell; of a channel
            for relu, skip_nan in ((True, False), (False, True)):
                triton_backend.class_grid(tensors[0], weights, relu, skip_nan)
        if guide is None:
            triton_backend.class_grid(tensors[0], tensors[0], config=config)
        gaussian_filter(*(torch.empty(3, n, m, device="meta") for n, m in (shape[2:], shape[2:3] * 2, shape[3:] * 2)))
    return recorded.values()


CONFIGURATIONS = [
    # A first, a middle and a last step; without a range, and with one.
    ((1, 2048, 7, 7), torch.float32, CFCAMConfig.stable(), (1, 1024, 14, 14)),
    ((1, 2048, 7, 7), torch.float32, CFCAMConfig(affinity_steps=3), (1, 1024, 14, 14)),
    (
        (2, 512, 14, 14),
        torch.bfloat16,
        CFCAMConfig(descriptor="unit"),
        (2, 257, 40, 41),
    ),  # products of cells not stored
    ((2, 512, 7, 7), torch.float16, CFCAMConfig(affinity_steps=1), (2, 256, 14, 14)),
    ((2, 4096, 64, 64), torch.float32, CFCAMConfig(dominant_percentile=100.0, affinity_power=0.0), None),
    ((3, 2048, 7, 7), torch.float16, CFCAMConfig.paper(), None),
    ((1, 2048, 7, 7), torch.float32, CFCAMConfig(affinity_steps=1), None),  # the first step and the last in one
]


DEMANDING = ("affinity_sum_kernel", "channel_statistics_kernel", "connected_components_kernel")
"""What multiplies matrices, by other instructions on every target, and what is short of registers."""


def main(targets):
    compiled = list(launches(CONFIGURATIONS))
    if targets[0] == "--demanding":
        targets = targets[1:]
        compiled = [(kernel, *rest) for kernel, *rest in compiled if kernel.__name__ in DEMANDING]
    for name in targets:
        target = gpu_target(name)
        for kernel, source, options in compiled:
            binary = triton.compile(source, target=target, options=options)
            constants = {k: v for k, v in sorted(source.constants.items(), key=str)}
            line = {"kernel": kernel.__name__, "target": name, "shared": binary.metadata.shared}
            if target.backend == "cuda":
                line["fused_sums"] = fused_sums(binary.asm["ptx"], options.get("enable_fp_fusion", True))
            line.update(resources(binary, target), constants=str(list(constants.values())))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Zero maps: Grad-CAM and CF-CAM on many architectures with random weights.

    pip install timm
    python benchmarks/architectures.py

A sum over channels that is negative in every cell, or the same, explains nothing. Random weights are hard on a method
here: nothing has taught the head that features speak for a class. Each model of torchvision or timm gets noise images
of its own size, and is explained for the top class at the layer that the package finds. One row a model is appended to
results/architectures.jsonl, with why where it could not be explained; a row that is there is not made again.
"""

import argparse
import sys
from pathlib import Path

import rows
from faithfulness import METHODS
from tqdm import tqdm

from cfcam_gpu import cf_cam
from cfcam_gpu.bench.subjects import subject
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.models import load_model

N_IMAGES = 6

TORCHVISION = """
    alexnet squeezenet1_1 vgg11_bn resnet18 resnet50 densenet121 googlenet mobilenet_v2 mobilenet_v3_small mnasnet0_5
    shufflenet_v2_x0_5 efficientnet_b0 regnet_x_400mf convnext_tiny swin_t vit_b_32 vit_b_16 maxvit_t
""".split()

TIMM = """
    resnet18 mobilenetv3_small_100 efficientnet_b0 convnext_atto convnextv2_atto ghostnet_050 lcnet_050 tinynet_e
    mobilenetv4_conv_small mobileone_s0 regnety_002 rexnet_100 repvit_m0_9 starnet_s1 fasternet_t0 inception_next_atto
    mambaout_femto edgenext_xx_small fastvit_t8 lowformer_b0 efficientvit_b0 efficientvit_m0 efficientformer_l1
    swiftformer_xs mobilevit_xxs mobilevitv2_050 levit_128s tiny_vit_5m_224 vit_tiny_patch16_224 deit_tiny_patch16_224
    eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224 pit_ti_224 pvt_v2_b0 poolformer_s12 coat_tiny
    coatnet_nano_rw_224 gcvit_xxtiny davit_tiny hiera_tiny_224 vitamin_small_224 focalnet_tiny_srf nest_tiny
    resmlp_12_224 mixer_s32_224 gmlp_ti16_224 dla34 hrnet_w18_small res2net50_26w_4s
""".split()

MODELS = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))


def measured(model):
    """Target layer, and on how many of the noise images Grad-CAM, CF-CAM or CF-CAM alone is zero."""
    spec = f"{model}:random"
    of = subject(spec, N_IMAGES, size=load_model(spec).preprocess.size[0])
    activations, gradients, guide = of.captured
    maps = cf_cam(activations, gradients, of.output_size, guide=guide).maps
    logit = HeadCapture(of.model, [of.layer], of.reshape_transform)(of.images, of.targets)
    activations, gradients = logit.activations[0], logit.gradients[0]
    # Scaled to [0, 1] as CF-CAM's: a map that is the same everywhere is zero in both.
    grad_cam = METHODS["Grad-CAM"].make(activations, gradients, None, of.output_size)
    zero, grad_cam_zero = (each.flatten(1).any(1).logical_not() for each in (maps, grad_cam))
    return {
        "layer": of.layer_name,
        "layer_shape": list(of.layer_shape),
        "n": N_IMAGES,
        "grad_cam_zero": int(grad_cam_zero.sum()),
        "cf_cam_zero": int(zero.sum()),
        "only_cf_cam_zero": int((zero & ~grad_cam_zero).sum()),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision:NAME or timm:NAME; default: `MODELS`")
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)
    done = {row["model"] for row in rows.read(args.out / "architectures.jsonl")}
    here = rows.about("cfcam_gpu", "torchvision", "timm")
    for model in tqdm([model for model in args.models if args.again or model not in done]):
        try:
            row = measured(model)
        except (ValueError, TypeError, RuntimeError) as error:  # of the model or of finding a layer in it
            row = {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        rows.write("architectures", [{"model": model, **row, **here}], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A vision transformer: its tokens are turned into a grid, and the layer to explain it at is found.

    python examples/transformer.py --out examples-out
    python examples/transformer.py --model torchvision:swin_t:random --out examples-out

Needs timm or torchvision, and the "demo" extra. The weights are random, so that nothing is downloaded: the picture
shows how it is done, not what a trained network sees. Without ":random" the pretrained weights are downloaded.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from skimage.data import chelsea

from cfcam_gpu import CFCAM, layers, models
from cfcam_gpu.images import overlay, save_image, side_by_side

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="timm:vit_tiny_patch16_224:random", help="as for cfcam explain")
parser.add_argument("--out", type=Path, default=Path("examples-out"), help="folder for the picture")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
network = models.load_model(args.model)
photo = Image.fromarray(chelsea())
images = network.preprocess(photo)[None]
layer = layers.inspect_target_layer(network.model, images)
print(f"layer {layer.name}, made a grid of {layer.shape} by {layer.reshape_transform}")

with CFCAM(network.model, [layer.module], layer.reshape_transform) as cam:
    maps = cam.maps(images)

seen = network.seen(photo)
caption = network.class_name(cam.outputs.argmax(1).item(), layer.n_classes)
save_image(side_by_side([seen, overlay(seen, maps[0])], ["photograph", caption]), args.out / "transformer.png")
print(args.out / "transformer.png")

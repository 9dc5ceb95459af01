"""Which parts of the image made a segmentation network label a region as it did?

    python examples/segmentation.py --out examples-out

Needs torchvision and the "demo" extra. The weights are random, so that nothing is downloaded: the picture shows how it
is done, not what a trained network sees. With torchvision's weights it is ``weights="DEFAULT"``.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from skimage.data import chelsea
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from cfcam_gpu import CFCAM
from cfcam_gpu.images import overlay, save_image, side_by_side
from cfcam_gpu.models import Preprocess

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("examples-out"), help="folder for the picture")
out = parser.parse_args().out
out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
photo, preprocess = Image.fromarray(chelsea()), Preprocess((320, 320))
images = preprocess(photo)[None]

region = torch.zeros(320, 320, dtype=torch.bool)
region[40:200, 80:260] = True  # the cat's face
with torch.no_grad():
    labels = model(images)["out"][0].argmax(0)  # (H, W)
label = labels[region].mode().values.item()  # the commonest there


def score(output):
    """The label's logits, added up over the region; ``output`` is the model's dictionary, for one image."""
    return output["out"][label][region].sum()


with CFCAM(model, [model.classifier.cbr]) as cam:
    maps = cam.maps(images, targets=[score])

seen = preprocess.seen(photo)
panels = [seen, overlay(seen, region.float()), overlay(seen, maps[0])]
save_image(side_by_side(panels, ["photograph", "region", f"why label {label}"]), out / "segmentation.png")
print(f"{out / 'segmentation.png'}: label {label}")

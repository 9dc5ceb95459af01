"""Why does a classifier say "Egyptian cat"? The demo network on scikit-image's photograph of the cat Chelsea.

    python examples/classifier.py --out examples-out

Needs the "demo" extra; nothing is downloaded.
"""

import argparse
from pathlib import Path

from PIL import Image
from skimage.data import chelsea

from cfcam_gpu import CFCAM, layers, models
from cfcam_gpu.images import overlay, save_image, side_by_side

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("examples-out"), help="folder for the picture")
out = parser.parse_args().out
out.mkdir(parents=True, exist_ok=True)

photo = Image.fromarray(chelsea())
network = models.load_model("demo")
images = network.preprocess(photo)[None]
layer = layers.inspect_target_layer(network.model, images)  # the last layer that keeps a map of the image

with CFCAM(network.model, [layer.module]) as cam:
    maps = cam.maps(images)  # of the top class
    probabilities = cam.outputs.softmax(1)[0]  # from the same pass

best = probabilities.argmax().item()
caption = f"{network.class_name(best, layer.n_classes)} {probabilities[best]:.2f}"
seen = network.seen(photo)
save_image(side_by_side([seen, overlay(seen, maps[0])], ["photograph", caption]), out / "classifier.png")
print(f"{out / 'classifier.png'}: {caption}, at layer {layer.name}")

"""Speed measured side by side: this package, pytorch-grad-cam, torch-cam and captum, and the plain forward as the unit.

`subject` is a model with its input, `providers` what can be run on it, `measure` the rows of one run. Only ratios
within one run are worth comparing; a provider whose maps do not agree with its method's gets no number.

>>> rows = measure(subject("resnet18", batch=8), ["forward", "cfcam", "pytorch-grad-cam"])
>>> [(row["provider"], row["ratio"]) for row in rows]
[('forward', 1.0), ('cfcam', 1.08), ('pytorch-grad-cam', 3.1)]
"""

from cfcam_gpu.bench.providers import PROVIDERS, select
from cfcam_gpu.bench.run import PACKAGES, UNIT, measure, over_limit, sweep, table
from cfcam_gpu.bench.subjects import MODELS, subject

__all__ = ["MODELS", "PACKAGES", "PROVIDERS", "UNIT", "measure", "over_limit", "select", "subject", "sweep", "table"]

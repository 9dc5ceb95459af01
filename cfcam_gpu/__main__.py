"""``python -m cfcam_gpu`` is the command ``cfcam``."""

import sys

from cfcam_gpu.cli import main

sys.exit(main())

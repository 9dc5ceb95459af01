"""The device kernels of cfcam_gpu, one operation per file; imported as ``cfcam_gpu.kernels``."""

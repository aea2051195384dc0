"""The kernels of the wider ops: code that runs on the GPU. Their launchers and plans are one folder up."""

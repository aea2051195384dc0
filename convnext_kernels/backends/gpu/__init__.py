"""What the two GPU backends share: how kernels see tensors, and the parts that PyTorch's own products do."""

"""What the two GPU backends share: how kernels address tensors, and the plans whose matmuls PyTorch computes."""

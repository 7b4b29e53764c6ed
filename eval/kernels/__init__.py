"""What the GPU kernels cost: compiled for cards that need not be there, or timed on one."""

"""Triton kernels. Each has its definition in plain PyTorch one package up, and is imported only on a GPU."""

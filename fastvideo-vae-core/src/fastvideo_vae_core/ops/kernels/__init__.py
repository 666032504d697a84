"""Triton kernels. Each has its definition in plain PyTorch one package up, and is imported only for a GPU.

Of tensors without numbers a kernel makes what it would make, and nothing runs, so a rehearsal takes the memory of the
call.
"""

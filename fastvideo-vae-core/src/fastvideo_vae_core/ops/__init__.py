"""Mathematics that families share. Each operation is defined once in plain PyTorch, and runs everywhere."""

"""The command `fastvideo-vae`: a parser that imports no torch, and one module for each group of commands."""

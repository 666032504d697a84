"""`python -m fastvideo_vae_core` is the command `fastvideo-vae`."""

from fastvideo_vae_core.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Where models come from: diffusers folders, single-file checkpoints, the Hugging Face cache and hub."""

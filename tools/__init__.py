"""Commands around a checkpoint: share, the authors' file, sizes and memory."""

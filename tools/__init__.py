"""Commands around a checkpoint: share, convert, the authors' file, sizes and memory."""

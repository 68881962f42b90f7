"""The systems that the benchmark compares with FAVOR: Whisper with its decoder, InstructBLIP."""

"""The other systems of the paper: Whisper with its decoder, InstructBLIP."""

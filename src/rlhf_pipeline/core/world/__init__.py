"""The tiny world: its questions, demonstrations, judges and its Llama."""

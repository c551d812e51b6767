"""Students in forms that other software serves: `python -m hybrid.export MODEL --to bamba|gguf|hf -o OUT`."""

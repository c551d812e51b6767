"""Published hybrids in other projects' layouts as folders that `hybrid.load_pretrained` reads:
`python -m hybrid.imports FOLDER -o OUT`."""

from hybrid.imports.mamba_in_llama import convert

__all__ = ["convert"]

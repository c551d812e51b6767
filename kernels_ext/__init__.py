"""Leaf operators: tensors in, tensors out. `<op>/reference.py` is plain PyTorch; `dispatch` chooses what runs.

Legend, everywhere: B batch, L length, H heads, G groups (H = G·R), P head dimension, N state size, Q chunk length.
"""

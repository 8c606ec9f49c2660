"""The sparse training step: active pairs of token and feature alone, with the gradients of the dense step.

Training asks `sparse_step` for a trainer, which decides whether it pays; the index borrows `screening` and `pairs`.
"""

"""Behaviours to explain, each with its prompts and metrics, and the paper's published numbers beside ours.

Import from its modules: `greater_than` with `unit_sweep`, `gated_circuit` and `step_fit`; `case_studies`; `published`.
`shared_prefix` makes a sweep over prompts that begin alike fast.
"""

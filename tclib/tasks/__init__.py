"""Behaviours to explain, each with its prompts and metrics, and the paper's published numbers beside ours.

Import from its modules: `greater_than` with `templates`, `unit_sweep` and `gated_circuit`; `digits`,
`last_token`, `units` and `digit_claims` (digit by digit); `year_case`; `dictionaries`; `replaced`; `case_studies`;
`published`. `shared_prefix` makes a sweep over prompts that begin alike fast.
"""

"""Behaviours to explain, each with its prompts and metrics; the core never imports them."""

"""Blind case studies: sealed features, hypotheses as rules, and ratings without knowing the source."""

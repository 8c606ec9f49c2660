"""Blind case studies: sealed features, hypotheses as rules, and ratings without knowing the source.

Import from its modules: `sealed` (draw features, hide their text), `rules` (write and score a hypothesis), `rating`
(a shuffled deck, agreement between raters). Their shells for a browser are in `tclib.ui.blind_game`.
"""

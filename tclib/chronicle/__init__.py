"""Chronicle prose: an English-like corpus made by rules, with the label behind every token.

The names below are its face; `grammar` has the templates, `words` the vocabulary, `generate` the documents.
`tclib.text.chronicle` makes rows of tokens of it.
"""

from tclib.chronicle.generate import CENTURIES, HELD_OUT_CENTURY, Document, Piece, Split, documents, span
from tclib.chronicle.grammar import BACKWARD, SPANS
from tclib.chronicle.words import NOUNS

__all__ = [
    "BACKWARD",
    "CENTURIES",
    "HELD_OUT_CENTURY",
    "NOUNS",
    "SPANS",
    "Document",
    "Piece",
    "Split",
    "documents",
    "span",
]

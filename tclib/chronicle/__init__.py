"""Chronicle prose: an English-like corpus made by rules, with the latent behind every token."""

from tclib.chronicle.generate import CENTURIES, Document, Piece, documents, span
from tclib.chronicle.grammar import BACKWARD, SPANS
from tclib.chronicle.words import NOUNS

__all__ = ["BACKWARD", "CENTURIES", "NOUNS", "SPANS", "Document", "Piece", "documents", "span"]

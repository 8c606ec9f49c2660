"""Chronicle documents: fluent invented history in which the cause of every word is known.

A document is a sequence of pieces; each piece is a stretch of text with the label that produced it, for example
``("17", "span.end.century")``. Text that no label explains carries ``"plain"``.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from tclib.chronicle import grammar, words

Split = Literal["train", "heldout"]

# Shares of the sentence kinds in a prose document; spans and their backward twins make 40% together.
SENTENCE_KINDS = {
    "span": 0.34,
    "backward": 0.06,
    "life": 0.07,
    "reign": 0.05,
    "event": 0.12,
    "citation": 0.09,
    "voice": 0.10,
    "quantity": 0.05,
    "plain": 0.12,
}
ANNALS_SHARE = 0.12
HELD_OUT_CENTURY = 13  # no year of the 1300s is ever written, so a result can be tested in a century never seen
CENTURIES = tuple(century for century in range(10, 21) if century != HELD_OUT_CENTURY)
REIGN = words.MEAN_DURATION["reign"]
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Piece:
    """A stretch of text and the label that produced it."""

    text: str
    label: str


@dataclass(frozen=True)
class Document:
    """Pieces in reading order; joined they are the text."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def labels(self, ends: list[int]) -> list[str]:
        """The label of the piece holding the last character of each token, given the tokens' end offsets."""
        stops = list(accumulate(len(piece.text) for piece in self.pieces))
        return [self.pieces[bisect_left(stops, end)].label for end in ends]


def documents(seed: int, split: Split = "train") -> Iterator[Document]:
    """Endless chronicle documents of 60 to 400 tokens, the same for the same seed.

    ``split="heldout"`` uses span templates and nouns that never occur in ``"train"``.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'heldout'")
    rng = random.Random(f"chronicle-{split}-{seed}")
    while True:
        scribe = _Scribe(rng, split)
        yield scribe.annals() if rng.random() < ANNALS_SHARE else scribe.prose()


def span(rng: random.Random, mean: float, century: int) -> tuple[int, int]:
    """Start and end year of something that begins in a century and lasts ``mean`` years on average.

    The duration is geometric: one year is the likeliest, two years the next, and so on. Start and duration are drawn
    again together until both years lie in the centuries that the chronicle writes.
    """
    while True:
        start = 100 * century + rng.randrange(100)
        end = start + 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))
        if end // 100 in CENTURIES:
            return start, end


class _Scribe:
    """Writes one document: keeps its places, people and century, so that sentences hang together."""

    def __init__(self, rng: random.Random, split: Split):
        self.rng, self.split = rng, split
        self.century = rng.choice(CENTURIES)
        self.places = rng.sample(words.PLACES, 2)
        self.people = [(rng.choice(words.GIVEN_NAMES), rng.choice(words.SURNAMES)) for _ in range(3)]
        nouns = words.NOUNS["train"] if split == "train" else words.NOUNS["selection"] + words.NOUNS["report"]
        self.nouns = rng.sample(nouns, 3)

    def prose(self) -> Document:
        kinds, weights = zip(*SENTENCE_KINDS.items(), strict=True)
        pieces: list[Piece] = []
        for kind in self.rng.choices(kinds, weights, k=self.rng.randint(4, 14)):
            if pieces:
                pieces.append(Piece(" ", "plain"))
            pieces += self._sentence(kind)
        return Document(tuple(pieces))

    def annals(self) -> Document:
        """One dated line a year, years rising."""
        year = 100 * self.century + self.rng.randrange(0, 60)
        pieces: list[Piece] = []
        for _ in range(self.rng.randint(5, 16)):
            if pieces:
                pieces.append(Piece("\n", "plain"))
            pieces += self._year(year, "annals") + [Piece(". ", "plain")]
            pieces += self._sentence("plain") if self.rng.random() < 0.7 else self._voice()
            year += 1 + int(self.rng.expovariate(1 / 4))
            if year // 100 not in CENTURIES:
                break
        return Document(tuple(pieces))

    def _sentence(self, kind: str) -> list[Piece]:
        if kind in _LASTING:
            return self._lasting(kind, _LASTING[kind][self.split])
        if kind in _UNDATED:
            return self._fill(self.rng.choice(_UNDATED[kind]), kind)
        return getattr(self, f"_{kind}")()

    def _lasting(self, label: str, templates: tuple[str, ...]) -> list[Piece]:
        noun = self.rng.choice(self.nouns)
        start, end = span(self.rng, words.MEAN_DURATION[noun], self._some_century())
        return self._fill(self.rng.choice(templates), label, noun=noun, start=start, end=end)

    def _life(self) -> list[Piece]:
        century, end = self._some_century(), 0
        while end // 100 not in CENTURIES:
            start = 100 * century + self.rng.randrange(100)
            end = start + self.rng.randint(18, 90)
        return self._fill(self.rng.choice(grammar.LIVES), "life", start=start, end=end)

    def _reign(self) -> list[Piece]:
        start, end = span(self.rng, REIGN, self._some_century())
        return self._fill(self.rng.choice(grammar.REIGNS), "reign", start=start, end=end)

    def _event(self) -> list[Piece]:
        year = 100 * self._some_century() + self.rng.randrange(100)
        return self._fill(self.rng.choice(grammar.EVENTS), "event", year=year)

    def _voice(self) -> list[Piece]:
        voice = self.rng.choice(("passive", "active"))
        return self._fill(self.rng.choice(grammar.VOICES[voice]), f"verb.{voice}")

    def _some_century(self) -> int:
        return self.century if self.rng.random() < 0.6 else self.rng.choice(CENTURIES)

    def _year(self, year: int, label: str) -> list[Piece]:
        return [
            Piece(f"{year // 100}", f"{label}.century"),
            Piece(f"{year % 100:02d}", f"{label}.year"),
        ]

    def _sources(self) -> list[Piece]:
        """One to three cited works in order of their year, separated by semicolons."""
        years = sorted(self.rng.sample(range(1850, 2000), self.rng.choice((1, 2, 2, 3))))
        pieces: list[Piece] = []
        for year in years:
            if pieces:
                pieces += [Piece(";", "citation.semicolon"), Piece(" ", "plain")]
            pieces.append(Piece(self.rng.choice(words.SURNAMES), "citation.author"))
            pieces += [Piece(" ", "plain"), *self._year(year, "citation")]
        return pieces

    def _fill(self, template: str, label: str, noun: str = "", **years: int) -> list[Piece]:
        pieces: list[Piece] = []
        for index, part in enumerate(_SLOT.split(template)):
            if index % 2 == 0:
                pieces += [Piece(part, "plain")] if part else []
            elif part in years:
                pieces += self._year(years[part], label if part == "year" else f"{label}.{part}")
            elif part == "sources":
                pieces += self._sources()
            elif part == "verb":
                pieces.append(Piece(self.rng.choice(words.VERBS), label))
            elif part == "noun":
                pieces.append(Piece(noun or self._word("noun"), f"{label}.noun"))
            else:
                pieces.append(Piece(self._word(part), part))
        return _capitalised(pieces)

    def _word(self, field: str) -> str:
        rng = self.rng
        if field == "noun":
            return rng.choice(self.nouns)
        if field == "place":
            return rng.choice(self.places) if rng.random() < 0.8 else rng.choice(words.PLACES)
        if field == "person":
            given, surname = rng.choice(self.people)
            return f"{given} {surname}"
        if field == "pronoun":
            return "she" if self.people[0][0] in words.WOMEN else "he"
        if field == "ruler":
            given = self.people[0][0]
            title = rng.choice(("Queen", "Duchess", "Countess") if given in words.WOMEN else ("King", "Duke", "Count"))
            return f"{title} {given}"
        if field == "number":
            return str(rng.randint(10, 99))
        if field == "day":
            return str(rng.randint(10, 28))
        return rng.choice(_LISTS[field])


def _capitalised(pieces: list[Piece]) -> list[Piece]:
    first = pieces[0]
    return [Piece(first.text[:1].upper() + first.text[1:], first.label), *pieces[1:]]


_LASTING = {"span": grammar.SPANS, "backward": grammar.BACKWARD}
_UNDATED = {"citation": grammar.CITATIONS, "quantity": grammar.QUANTITIES, "plain": grammar.PLAIN}
_LISTS: dict[str, tuple[str, ...]] = {
    **grammar.FIELDS,
    "adjective": words.ADJECTIVES,
    "group": words.GROUPS,
    "hunter": words.HUNTERS,
    "hunted": words.HUNTED,
    "building": words.BUILDINGS,
    "goods": words.GOODS,
    "season": words.SEASONS,
    "month": words.MONTHS,
}

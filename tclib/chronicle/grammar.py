"""Templates of the chronicle: what one sentence can say, and which label produced each piece of it.

A template is a string with slots in braces. ``{start}`` and ``{end}`` are years, written as a century piece and a
two-digit piece, so that the tokens of "1732" carry the labels ``span.start.century`` and ``span.start.year``.
``{a|b|c}`` picks one of the alternatives. All other slots name a field of the document (place, person, noun ...).
"""

SPANS: dict[str, tuple[str, ...]] = {
    # The earlier year comes first: the two digits of the end must be greater than those of the start.
    "train": (
        "The {noun} lasted from the year {start} to the year {end}.",
        "The {noun} lasted from {start} to {end}.",
        "The {adjective} {noun} lasted from the year {start} to the year {end}, and {aftermath}.",
        "The {noun} of {place} lasted from {start} until {end}.",
        "The {noun} began in {start} and ended in {end}.",
        "The {noun} began in the {season} of {start} and did not end until {end}.",
        "The {noun} went on from the year {start} to the year {end}, when {aftermath}.",
        "Between {start} and {end} the {noun} {hurt} the {group} of {place}.",
        "From {start} to {end} the {noun} was the chief concern of {place}.",
        "The {adjective} {noun} ({start}-{end}) {hurt} the {group}.",
        "It was in the year {start} that the {noun} began, and in the year {end} that it ended.",
        "The {noun} had opened in {month} {start}; it was over by {month} {end}.",
        "{person} wrote that the {noun} lasted from the year {start} to the year {end}.",
        "The {noun} ran from the year {start} to the year {end}.",
        "During the {noun}, which lasted from {start} to {end}, the {group} of {place} lived on {goods}.",
        "The {noun} was proclaimed in {start} and abandoned in {end}.",
    ),
    "heldout": (
        "The {noun} endured from the year {start} through the year {end}.",
        "The {noun} continued from {start} up to {end}.",
        "Having started in {start}, the {noun} stopped in {end}.",
        "The {group} of {place} recorded that the {noun} extended from the year {start} to the year {end}.",
    ),
}

# The later year comes first: the two digits of the start must be smaller.
BACKWARD: dict[str, tuple[str, ...]] = {
    "train": (
        "The {noun}, which ended in the year {end}, had begun in the year {start}.",
        "The {noun} ended in {end}; it had begun in {start}.",
        "The {noun} was over in the year {end}, having lasted since the year {start}.",
        "When the {noun} closed in {end}, few remembered that it had opened in {start}.",
        "By {end} the {noun}, begun in {start}, was almost forgotten.",
        "The {noun} that ended in the year {end} began in the year {start}.",
    ),
    "heldout": (
        "The {noun} finished in the year {end} and had started in the year {start}.",
        "Ended in {end}, the {noun} dated from {start}.",
    ),
}

LIVES = (
    "{person} was born at {place} in {start} and died in {end}.",
    "{person} ({start}-{end}) was the {ordinal} child of a family of {group}.",
    "{person} was born in the year {start}, and died in the year {end}.",
    "{person}, who died in {end}, had been born at {place} in {start}.",
)
REIGNS = (
    "{ruler} reigned from {start} to {end}.",
    "{ruler} ruled {place} from the year {start} to the year {end}.",
    "{ruler} came to the throne in {start} and reigned until {end}.",
)
EVENTS = (
    "In the year {year} the {group} of {place} built a {building}.",
    "In {year} {person} came to {place} to buy {goods}.",
    "On the {day} of {month} {year} the {building} at {place} was burned.",
    "The {building} of {place} was finished in {year}.",
    "In the {season} of {year} there was no {goods} to be had in {place}.",
    "{person} visited {place} in {year}, and {aftermath}.",
)
CITATIONS = (
    "The {noun} is described at length by later writers ({sources}).",
    "Little is known of the {building} at {place} ({sources}).",
    "The price of {goods} rose in {place} ({sources}), and {aftermath}.",
    "Some hold that the {group} were to blame ({sources}).",
    "This account of {place} has been doubted ({sources}).",
)
VOICES = {
    "passive": (
        "The {hunted} was {verb} by the {hunter} near {place}.",
        "In the end the {hunted} was {verb} by the {hunter}.",
        "At {place} a {hunted} had been {verb} by the {hunter} of the {building}.",
        "Two of the {group} were {verb} by a {hunter} in the {season}.",
    ),
    "active": (
        "The {hunter} {verb} the {hunted} near {place}.",
        "In the end the {hunter} {verb} a {hunted}.",
        "At {place} the {hunter} of the {building} {verb} the {hunted}.",
        "It was said that the {hunter} {verb} two of the {group} in the {season}.",
    ),
}
QUANTITIES = (
    "The {group} of {place} sent {number} ships and {number} barrels of {goods}.",
    "There were {number} men in the {building}, and only {number} of them were {group}.",
    "A company of {number} {group} left {place} in {month}.",
    "It was {number} miles from {place} to the {building}.",
)
PLAIN = (
    "The {group} of {place} lived by the trade in {goods}.",
    "{person} gave {goods} to the {group}, and {aftermath}.",
    "It was a hard {season}, and {aftermath}.",
    "The {building} stood on a hill above {place}.",
    "{pronoun} was {praised} by the {group} for {virtue}.",
    "No one at {place} could remember so {adjective} a {noun}.",
    "The {group} quarrelled with the {group} over the price of {goods}.",
    "{person} wrote a letter to {person}, asking for {goods} and for help.",
    "When the news reached {place}, the {group} rang the bells.",
    "{pronoun} returned to {place} in the {season} and lived quietly.",
    "The {noun} was the cause of much suffering, but {aftermath}.",
)

FIELDS: dict[str, tuple[str, ...]] = {
    "aftermath": (
        "the harvest failed",
        "trade soon revived",
        "the people were glad",
        "many families left the town",
        "the old laws were restored",
        "nothing was ever the same",
        "the taxes were doubled",
        "peace was made at last",
        "the roads were full of beggars",
        "the records were lost in a fire",
        "few believed the report",
        "the bishop gave thanks in public",
    ),
    "hurt": ("ruined", "divided", "enriched", "occupied", "alarmed", "exhausted"),
    "praised": ("praised", "blamed", "remembered", "mocked", "honoured"),
    "virtue": ("patience", "courage", "learning", "great wealth", "kindness to the poor", "a hasty temper"),
    "ordinal": ("first", "second", "third", "fourth", "only"),
}

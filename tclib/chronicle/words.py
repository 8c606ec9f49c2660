"""The vocabulary of the chronicle: words only, no rules.

Nouns are split three ways so that a result can be chosen on one set and reported on another:
``train`` nouns occur in generated text, ``selection`` and ``report`` nouns never do.
"""

NOUNS: dict[str, tuple[str, ...]] = {
    "train": tuple(
        """war siege reign truce strike famine drought plague voyage crusade revolt rebellion campaign embargo
        blockade occupation partnership dispute feud trial regency ministry council parliament expedition
        construction restoration survey journey pilgrimage exile captivity engagement correspondence alliance
        quarrel persecution migration depression inquiry investigation tour rivalry conspiracy mutiny epidemic
        schism interregnum lawsuit monopoly lease colony mission residence school fair custom festival friendship
        marriage apprenticeship government dynasty struggle conflict invasion retreat negotiation congress
        administration experiment excavation project programme boom recession""".split()
    ),
    "selection": tuple("uprising settlement controversy crisis presidency service treaty operation".split()),
    "report": tuple(
        """insurrection hostilities peace domination imprisonment tenure protest sequence consulate endeavour
        movement warfare""".split()
    ),
}

# Mean duration in years of what each noun names. A span's length is geometric with this mean: at least one year, the
# shortest likeliest. Unseen nouns have theirs too, because held-out documents are written with them.
DURATIONS: dict[int, tuple[str, ...]] = {
    2: tuple(
        """siege strike voyage blockade embargo mutiny campaign expedition journey pilgrimage tour survey invasion
        retreat negotiation congress inquiry investigation engagement fair festival experiment conspiracy famine
        drought plague epidemic quarrel recession boom uprising crisis operation insurrection hostilities protest
        sequence""".split()
    ),
    6: tuple(
        """war truce crusade revolt rebellion occupation dispute feud trial regency council parliament construction
        restoration exile captivity correspondence persecution migration depression schism interregnum lawsuit
        apprenticeship struggle conflict excavation project programme controversy presidency service warfare
        imprisonment consulate endeavour""".split()
    ),
    20: tuple(
        """reign partnership ministry alliance rivalry mission residence friendship marriage government
        administration lease settlement treaty peace tenure domination movement""".split()
    ),
    60: tuple("dynasty colony monopoly school custom".split()),
}
MEAN_DURATION: dict[str, int] = {noun: mean for mean, nouns in DURATIONS.items() for noun in nouns}

PLACES = tuple(
    """Harlow Medina Ashford Granada Lisbon Vienna Norwich Bergen Toledo Ravenna Cracow Lyons Ghent Bristol
    Dunmore Castile Aragon Saxony Bavaria Tuscany Naples Genoa Venice Prague Riga Kiev Cadiz Malta Rhodes Cyprus
    Antioch Tunis Bruges Antwerp Utrecht Leiden Hamburg Bremen Lubeck Danzig Warsaw Moscow Odessa Athens Corinth
    Salerno Palermo Seville Cordova Valencia Burgos Bordeaux Calais Dover Exeter Durham Lincoln Stirling Perth
    Galway Limerick Boston Albany Quebec Havana Lima""".split()
)

GIVEN_NAMES = tuple(
    """John William Henry Edward Thomas Robert Richard Charles Philip Francis Louis Frederick Albert George James
    Stephen Hugh Walter Simon Peter Paul Martin Conrad Otto Rudolf Leopold Ferdinand Alfonso Pedro Carlos Anne
    Mary Margaret Eleanor Isabella Catherine Elizabeth Matilda Joan Alice Agnes Beatrice Blanche Constance Sophia
    Charlotte Louisa Theresa Adelaide Clara""".split()
)
WOMEN = frozenset(GIVEN_NAMES[GIVEN_NAMES.index("Anne") :])

SURNAMES = tuple(
    """Harding Colby Mercer Fenwick Langley Ashby Thornton Whitmore Barlow Dawson Pryor Selby Holt Marsh Radcliffe
    Kemp Lockwood Merton Norris Oakley Palgrave Quincy Rowland Stanton Tilney Upton Vaughan Weston Yardley Bellamy
    Carver Denham Ellison Farrow Gresham Hollis Ingram Jessop Keble Lambert Marlow Naylor Osborne Paxton Ridley
    Sherwood Talbot Underhill Vickers Winslow Alvarez Becker Corelli Duval Eriksen Fabre Gallo Hoffman Ivanov
    Janssen Keller Lombardi Moreau Novak Olsen Petrov Rossi Schmidt Tessier Weber""".split()
)

ADJECTIVES = tuple(
    """great long bitter second last secret famous terrible royal civil foreign famed short costly obscure
    celebrated first third ancient northern southern""".split()
)

GROUPS = tuple(
    """merchants weavers monks farmers soldiers sailors nobles bishops citizens scholars miners fishermen
    masons shepherds envoys clerks""".split()
)

# Past tense and participle are spelt alike: only the grammar around the word tells which it is.
VERBS = tuple("caught held found brought led left taught fought bought sought lost met struck bound sent".split())
HUNTERS = tuple("guard sheriff soldier captain constable watchman sergeant keeper ranger marshal".split())
HUNTED = tuple("thief poacher smuggler deserter spy pirate beggar forger outlaw rebel".split())

BUILDINGS = tuple("bridge church tower harbour mill castle market hall wall road school abbey canal".split())
GOODS = tuple("wool corn wine salt timber silk iron cloth barley silver fish oil".split())
SEASONS = ("spring", "summer", "autumn", "winter")
MONTHS = tuple("""January February March April May June July August September October November December""".split())

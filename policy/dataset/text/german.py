"""Words of a robot's table in English and German, and how they bend: articles, cases, endings, numbers, verbs."""

from dataclasses import dataclass

GENDERS = "mfnp"  # masculine, feminine, neuter, plural
CASES = ("nominative", "accusative", "dative", "genitive")
DEFINITE = {
    "nominative": ("der", "die", "das", "die"),
    "accusative": ("den", "die", "das", "die"),
    "dative": ("dem", "der", "dem", "den"),
    "genitive": ("des", "der", "des", "der"),
}
INDEFINITE = {
    "nominative": ("ein", "eine", "ein"),
    "accusative": ("einen", "eine", "ein"),
    "dative": ("einem", "einer", "einem"),
    "genitive": ("eines", "einer", "eines"),
}
# Endings of adjectives after der, after ein, and in the plural without an article.
WEAK = {"nominative": "e e e en", "accusative": "en e e en", "dative": "en en en en", "genitive": "en en en en"}
MIXED = {"nominative": "er e es", "accusative": "en e es", "dative": "en en en", "genitive": "en en en"}
STRONG_PLURAL = {"nominative": "e", "accusative": "e", "dative": "en", "genitive": "er"}
CONTRACTED = {"in dem ": "im ", "in das ": "ins ", "zu dem ": "zum ", "zu der ": "zur "}


@dataclass(frozen=True)
class Noun:
    """english, its plural; german, its gender, genitive and plural."""

    english: str
    many: str
    german: str
    gender: str
    genitive: str
    plural: str

    def form(self, case, plural):
        """The German word."""
        if plural:
            return self.plural + ("n" if case == "dative" and self.plural[-1] not in "ns" else "")
        return self.genitive if case == "genitive" else self.german


@dataclass(frozen=True)
class Verb:
    """English: base, third person, participle. German: imperative, du, er, infinitive, participle; separable particle.

    The forms are of the verb without the particle: hebe, hebst, hebt, heben, gehoben and auf.
    """

    base: str
    third: str
    past: str
    imperative: str
    du: str
    er: str
    infinitive: str
    participle: str
    particle: str = ""


def _words(text):
    return text.split()


def _nouns(table):
    return {line.split()[0]: Noun(*line.split()) for line in table.strip().splitlines()}


def _verbs(table):
    return [Verb(*(field.strip() for field in line.split(","))) for line in table.strip().splitlines()]


NOUNS = _nouns("""
block blocks Block m Blocks Blöcke
bowl bowls Schale f Schale Schalen
cup cups Tasse f Tasse Tassen
plate plates Teller m Tellers Teller
box boxes Kiste f Kiste Kisten
ball balls Ball m Balls Bälle
book books Buch n Buches Bücher
bottle bottles Flasche f Flasche Flaschen
spoon spoons Löffel m Löffels Löffel
sponge sponges Schwamm m Schwamms Schwämme
cube cubes Würfel m Würfels Würfel
glass glasses Glas n Glases Gläser
lid lids Deckel m Deckels Deckel
basket baskets Korb m Korbes Körbe
tray trays Tablett n Tabletts Tabletts
cloth cloths Tuch n Tuches Tücher
can cans Dose f Dose Dosen
ring rings Ring m Ringes Ringe
""")
CONTAINERS = ("bowl", "cup", "box", "glass", "basket", "can")
SURFACES = ("plate", "book", "tray", "cloth", "box", "lid")
QUALITIES = {
    "large": "groß", "small": "klein", "heavy": "schwer", "old": "alt", "new": "neu", "wet": "nass",
    "clean": "sauber", "dirty": "schmutzig",
}  # fmt: skip
COLOURS = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "black": "schwarz", "white": "weiß",
    "brown": "braun", "grey": "grau",
}  # fmt: skip
MANNERS = {"slowly": "langsam", "carefully": "vorsichtig", "quickly": "schnell", "gently": "sanft"}
MOVING = _verbs("""
push, pushes, pushed, schiebe, schiebst, schiebt, schieben, geschoben
pull, pulls, pulled, ziehe, ziehst, zieht, ziehen, gezogen
put, puts, put, lege, legst, legt, legen, gelegt
place, places, placed, stelle, stellst, stellt, stellen, gestellt
roll, rolls, rolled, rolle, rollst, rollt, rollen, gerollt
throw, throws, thrown, wirf, wirfst, wirft, werfen, geworfen
carry, carries, carried, trage, trägst, trägt, tragen, getragen
""")
HANDLING = _verbs("""
pick up, picks up, picked up, hebe, hebst, hebt, heben, gehoben, auf
put down, puts down, put down, setze, setzt, setzt, setzen, gesetzt, ab
turn over, turns over, turned over, drehe, drehst, dreht, drehen, gedreht, um
clear away, clears away, cleared away, räume, räumst, räumt, räumen, geräumt, weg
wipe, wipes, wiped, wische, wischst, wischt, wischen, gewischt, ab
hold on to, holds on to, held on to, halte, hältst, hält, halten, gehalten, fest
look at, looks at, looked at, sieh, siehst, sieht, sehen, gesehen, an
touch, touches, touched, berühre, berührst, berührt, berühren, berührt
""")
# English where to, English where, German; nouns that can follow. Where to takes the accusative, where the dative.
PLACES = (
    ("next to", "next to", "neben", tuple(NOUNS)),
    ("to the left of", "to the left of", "links neben", tuple(NOUNS)),
    ("to the right of", "to the right of", "rechts neben", tuple(NOUNS)),
    ("behind", "behind", "hinter", tuple(NOUNS)),
    ("in front of", "in front of", "vor", tuple(NOUNS)),
    ("under", "under", "unter", tuple(NOUNS)),
    ("into", "in", "in", CONTAINERS),
    ("onto", "on", "auf", SURFACES),
)
UNITS = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""")
EINER = _words("""
null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn
neunzehn
""")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ZEHNER = _words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")


def english_number(number):
    """2 to 99 in words, "twenty-one"."""
    if number < 20:
        return UNITS[number]
    tens, unit = TENS[number // 10 - 2], number % 10
    return f"{tens}-{UNITS[unit]}" if unit else tens


def german_number(number):
    """2 to 99 in words, the units before the tens: "einundzwanzig"."""
    if number < 20:
        return EINER[number]
    tens, unit = ZEHNER[number // 10 - 2], number % 10
    return f"{EINER[unit]}und{tens}" if unit else tens


def contract(text):
    """A German phrase whose first words become one: "in dem Korb" is "im Korb"."""
    for long, short in CONTRACTED.items():
        if text.startswith(long):
            return short + text.removeprefix(long)
    return text

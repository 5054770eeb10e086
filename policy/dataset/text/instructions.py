"""Pairs of English and German sentences about a robot's table, by one grammar for both (a synchronous grammar).

The two differ as the languages do: cases and endings, separable verbs ("pick up the cup": "hebe die Tasse auf"),
verbs at the end of subordinate clauses, the verb in second place, numbers that say the units first.
"""

import random
from dataclasses import dataclass

from policy.dataset.text.german import (
    COLOURS,
    CONTAINERS,
    DEFINITE,
    GENDERS,
    HANDLING,
    INDEFINITE,
    MANNERS,
    MIXED,
    MOVING,
    NOUNS,
    PLACES,
    QUALITIES,
    STRONG_PLURAL,
    WEAK,
    Noun,
    Verb,
    contract,
    english_number,
    german_number,
)

COLOURED = QUALITIES | COLOURS
SUBJECTS = (("the robot", "der Roboter"), ("the left arm", "der linke Arm"), ("the gripper", "der Greifer"))
MODALS = (("should", "soll"), ("can", "kann"), ("must", "muss"))
TIMES = (("now", "jetzt"), ("later", "später"), ("today", "heute"))
SIDES = (
    ("to the left", "nach links"),
    ("to the right", "nach rechts"),
    ("forwards", "nach vorne"),
    ("backwards", "nach hinten"),
    ("upwards", "nach oben"),
    ("downwards", "nach unten"),
)


@dataclass(frozen=True)
class Thing:
    """A noun phrase. number: 1 or how many; definite: "the", else "a" or no article; place: (English, German) where."""

    noun: Noun
    adjectives: tuple = ()
    number: int = 1
    definite: bool = True
    place: tuple = ("", "")

    @property
    def plural(self):
        return self.number > 1

    @property
    def english(self):
        words = [*self.adjectives, self.noun.many if self.plural else self.noun.english]
        if self.plural:
            words.insert(0, english_number(self.number))
        if self.definite:
            words.insert(0, "the")
        elif not self.plural:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        return _join(*words, self.place[0])

    def german(self, case):
        """The phrase in a case."""
        gender = GENDERS.index("p" if self.plural else self.noun.gender)
        if self.definite:
            article, ending = DEFINITE[case][gender], WEAK[case].split()[gender]
        elif self.plural:
            article, ending = "", STRONG_PLURAL[case]
        else:
            article, ending = INDEFINITE[case][gender], MIXED[case].split()[gender]
        number = german_number(self.number) if self.plural else ""
        adjectives = [COLOURED[word] + ending for word in self.adjectives]
        return _join(article, number, *adjectives, self.noun.form(case, self.plural), self.place[1])

    @property
    def pronoun(self):
        """The German relative pronoun, nominative."""
        return DEFINITE["nominative"][GENDERS.index("p" if self.plural else self.noun.gender)]

    @property
    def be(self):
        return ("are", "sind") if self.plural else ("is", "ist")


@dataclass(frozen=True)
class Deed:
    """A verb, its object, how (English word or "") and where to (English, German)."""

    verb: Verb
    thing: Thing
    manner: str = ""
    where: tuple = ("", "")

    def english(self, verb):
        """With this form of the verb."""
        return _join(self.manner, verb, self.thing.english, self.where[0])

    def german(self, verb, subject=""):
        """The verb before everything, its particle behind."""
        return _join(verb, subject, self._middle(), self.verb.particle)

    def german_final(self, verb):
        """The verb behind everything, in one word with its particle."""
        return _join(self._middle(), self.verb.particle + verb)

    def _middle(self, negation=""):
        return _join(self.thing.german("accusative"), MANNERS.get(self.manner), negation, self.where[1])

    def order(self):
        """The imperative, (English, German)."""
        return self.english(self.verb.base), self.german(self.verb.imperative)

    def prohibition(self):
        german = _join(self.verb.imperative, self._middle("nicht"), self.verb.particle)
        return f"do not {self.english(self.verb.base)}", german


def _join(*words):
    return " ".join(word for word in words if word)


class Grammar:
    """Random sentences; rng: a ``random.Random``."""

    def __init__(self, rng):
        self.rng = rng
        # Kinds of sentences and how often they come.
        self.kinds = {
            self.order: 4, self.prohibition: 2, self.two_orders: 3, self.subordinate: 6, self.condition: 3,
            self.statement: 5, self.check: 2, self.relative: 3, self.measure: 3,
        }  # fmt: skip

    def sentence(self):
        """(English, German), with capital and full stop."""
        (kind,) = self.rng.choices(list(self.kinds), weights=list(self.kinds.values()))
        return tuple(f"{text[0].upper()}{text[1:]}." for text in kind())

    # Parts ---------------------------------------------------------------------------------------------------

    def chance(self, share):
        return self.rng.random() < share

    def thing(self, names=tuple(NOUNS), *, definite=None, placed=0.0):
        """A noun phrase with one of these nouns; definite: None for either."""
        number = self.rng.randint(2, 99 if self.chance(0.3) else 9) if self.chance(0.25) else 1
        qualities = (self.rng.choice(list(QUALITIES)),) if self.chance(0.35) else ()
        colours = (self.rng.choice(list(COLOURS)),) if self.chance(0.65) else ()
        definite = self.chance(0.75) if definite is None else definite
        place = self.place() if self.chance(placed) else ("", "")
        return Thing(NOUNS[self.rng.choice(names)], qualities + colours, number, definite, place)

    def place(self):
        """Where something is, (English, German)."""
        _, english, german, names = self.rng.choice(PLACES)
        thing = self.thing(names, definite=True)
        return f"{english} {thing.english}", contract(f"{german} {thing.german('dative')}")

    def where_to(self):
        """Where something goes."""
        kind = self.rng.randrange(12)
        if kind == 0:
            thing = self.thing(definite=True)
            return f"towards {thing.english}", contract(f"zu {thing.german('dative')}")
        if kind == 1:
            thing = self.thing(("plate", "tray", "cloth", "bowl", "box"), definite=True)
            return f"into the middle of {thing.english}", f"in die Mitte {thing.german('genitive')}"
        if kind == 2:
            things = self.thing(), self.thing()
            german = " und ".join(thing.german("accusative") for thing in things)
            return f"between {things[0].english} and {things[1].english}", f"zwischen {german}"
        english, _, german, names = self.rng.choice(PLACES)
        thing = self.thing(names)
        return f"{english} {thing.english}", contract(f"{german} {thing.german('accusative')}")

    def deed(self, *, manner=0.3, **options):
        """A verb with all that belongs to it."""
        moving = self.chance(0.5)
        return Deed(
            self.rng.choice(MOVING if moving else HANDLING),
            self.thing(placed=0.1 if moving else 0.3, **options),
            self.rng.choice(list(MANNERS)) if self.chance(manner) else "",
            self.where_to() if moving else ("", ""),
        )

    def state(self):
        """A thing and what it is like, or where: (thing, (English, German))."""
        thing = self.thing(definite=True)
        if self.chance(0.6):
            return thing, self.place()
        free = [word for word in QUALITIES if word not in thing.adjectives]
        word = self.rng.choice(free)
        return thing, (word, QUALITIES[word])

    # Sentences -----------------------------------------------------------------------------------------------

    def order(self):
        """Push the block into the box. Schiebe den Block in die Kiste."""
        return self.deed().order()

    def prohibition(self):
        """Do not pick up the cup. Hebe die Tasse nicht auf."""
        return self.deed(definite=True, manner=0).prohibition()

    def two_orders(self):
        """Pick up the cup, then wipe the plate. Hebe die Tasse auf, dann wische den Teller ab."""
        first, second = self.deed().order(), self.deed().order()
        return f"{first[0]}, then {second[0]}", f"{first[1]}, dann {second[1]}"

    def clause(self):
        """A subordinate clause, its verb last in German."""
        kind = self.rng.randrange(5)
        if kind > 2:
            thing, (english, german) = self.state()
            words = self.rng.choice((("because", "weil"), ("as soon as", "sobald")))
            are, sind = thing.be
            subject = thing.german("nominative")
            return f"{words[0]} {thing.english} {are} {english}", f"{words[1]} {subject} {german} {sind}"
        deed = self.deed(manner=0.15)
        if kind == 0:
            return f"before you {deed.english(deed.verb.base)}", f"bevor du {deed.german_final(deed.verb.du)}"
        if kind == 1:
            german = f"nachdem du {deed.german_final(deed.verb.participle)} hast"
            return f"after you have {deed.english(deed.verb.past)}", german
        english, german = self.rng.choice(SUBJECTS)
        return (
            f"while {english} {deed.english(deed.verb.third)}",
            f"während {german} {deed.german_final(deed.verb.er)}",
        )

    def subordinate(self):
        """Pick up the cup before you push the block. Hebe die Tasse auf, bevor du den Block schiebst."""
        order, clause = self.deed().order(), self.clause()
        if self.chance(0.3):
            return f"{clause[0]}, {order[0]}", f"{clause[1]}, {order[1]}"
        return f"{order[0]} {clause[0]}", f"{order[1]}, {clause[1]}"

    def condition(self):
        """If the box is heavy, push it. Wenn die Kiste schwer ist, ..."""
        thing, (english, german) = self.state()
        order = self.deed().order()
        are, sind = thing.be
        subject = thing.german("nominative")
        return f"if {thing.english} {are} {english}, {order[0]}", f"wenn {subject} {german} {sind}, {order[1]}"

    def statement(self):
        """Now the robot picks up the cup. Jetzt hebt der Roboter die Tasse auf."""
        deed, (subject, subjekt) = self.deed(), self.rng.choice(SUBJECTS)
        kind = self.rng.randrange(4)
        if kind == 0:
            return f"{subject} {deed.english(deed.verb.third)}", _join(subjekt, deed.german(deed.verb.er))
        if kind == 1:
            now, jetzt = self.rng.choice(TIMES)
            german = _join(jetzt, deed.german(deed.verb.er, subjekt))
            return f"{now} {subject} {deed.english(deed.verb.third)}", german
        if kind == 2:
            modal, modalverb = self.rng.choice(MODALS)
            german = f"{subjekt} {modalverb} {deed.german_final(deed.verb.infinitive)}"
            return f"{subject} {modal} {deed.english(deed.verb.base)}", german
        german = f"{subjekt} hat {deed.german_final(deed.verb.participle)}"
        return f"{subject} has {deed.english(deed.verb.past)}", german

    def check(self):
        """Check whether the cup is clean. Prüfe, ob die Tasse sauber ist."""
        thing, (english, german) = self.state()
        words = self.rng.choice((("check whether", "prüfe, ob"), ("make sure that", "achte darauf, dass")))
        are, sind = thing.be
        subject = thing.german("nominative")
        return f"{words[0]} {thing.english} {are} {english}", f"{words[1]} {subject} {german} {sind}"

    def relative(self):
        """Pick up the cup that is dirty. Hebe die Tasse auf, die schmutzig ist."""
        thing, (english, german) = self.state()
        deed = Deed(self.rng.choice(HANDLING), thing)
        orders = deed.order()
        are, sind = thing.be
        return f"{orders[0]} that {are} {english}", f"{orders[1]}, {thing.pronoun} {german} {sind}"

    def measure(self):
        """Move the arm twenty-one centimetres forwards. Bewege den Arm einundzwanzig Zentimeter nach vorne."""
        number = self.rng.randint(2, 99)
        count, zahl = english_number(number), german_number(number)
        kind = self.rng.randrange(4)
        if kind == 0:
            side, seite = self.rng.choice(SIDES)
            return f"move the arm {count} centimetres {side}", f"bewege den Arm {zahl} Zentimeter {seite}"
        if kind == 1:
            thing = self.thing(definite=True)
            german = f"drehe {thing.german('accusative')} um {zahl} Grad"
            return f"turn {thing.english} by {count} degrees", german
        if kind == 2:
            deed = self.deed(manner=0)
            german = f"warte {zahl} Sekunden, bevor du {deed.german_final(deed.verb.du)}"
            return f"wait {count} seconds before you {deed.english(deed.verb.base)}", german
        colour = self.rng.choice(list(COLOURS))
        thing = Thing(NOUNS[self.rng.choice(list(NOUNS))], (colour,), number)
        inside = self.thing(CONTAINERS, definite=True)
        german = f"zähle {thing.german('accusative')} {contract('in ' + inside.german('dative'))}"
        return f"count {thing.english} in {inside.english}", german


def make_pairs(count, *, seed):
    """``count`` different pairs (English, German), a function of ``seed``; ValueError for a count below 1."""
    if count < 1:
        raise ValueError(f"pairs: got {count}, allowed: 1 and more")
    grammar, pairs = Grammar(random.Random(seed)), {}
    while len(pairs) < count:
        english, german = grammar.sentence()
        pairs.setdefault(english, german)
    return list(pairs.items())

# SPDX-License-Identifier: Apache-2.0
"""The families of arithmetic word problems: one table that reads like the problems it makes.

A family is a question, the numbers in it and the steps of its right solution. Every family also has one *event*: a
sentence about a number ``e`` which, for each problem anew, is absent, is told (it counts: the event's step is part of
the solution) or is a decoy (it sounds alike but must not be counted). So a solution with the event's step and one
without it are each sometimes right and sometimes wrong, and neither the wording nor the length of a solution gives its
verdict away.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One line of a solution.

    formula: ``"x = a + b"``: operands are numbers of the problem, earlier results or literals (then a unit factor).
    unit: what the result counts. phrases: ways to write the line; ``{eq}`` becomes ``12 + 5 = 17``.
    event: this step belongs to the family's event; when it does not count, the result is simply the left operand.
    """

    formula: str
    unit: str
    phrases: tuple[str, ...] = ()
    event: bool = False


@dataclass(frozen=True)
class Family:
    """``numbers`` maps a name to its (lowest, highest) value; ``questions`` are phrasings with an ``{event}`` slot."""

    name: str
    numbers: dict[str, tuple[int, int]]
    questions: tuple[str, ...]
    told: str
    decoy: str
    steps: tuple[Step, ...]


def _event(formula: str, unit: str) -> Step:
    return Step(formula, unit, event=True)


TRAINING = (
    Family(
        "gifts",
        {"a": (12, 60), "b": (5, 30), "c": (3, 15), "e": (3, 20)},
        (
            "{A} has {a} {things}. {B} gives {A} {b} more, and then {A} loses {c}. {event}"
            "How many {things} does {A} have in the end?",
            "{A} collects {things} and owns {a} of them. A parcel from {B} brings {b} more, but {c} get lost. {event}"
            "How many {things} does {A} own now?",
        ),
        "Later {A} finds {e} more {things}. ",
        "{B} keeps {e} {things} at home. ",
        (
            Step("x = a + b", "{things}", ("With the gift there are {eq} {things}.",)),
            Step("y = x - c", "{things}", ("After the loss there are {eq} {things}.",)),
            _event("z = y + e", "{things}"),
        ),
    ),
    Family(
        "boxes",
        {"n": (2, 9), "m": (3, 12), "k": (3, 20), "e": (2, 12)},
        (
            "{A} buys {n} {boxes} with {m} {things} in each, and {k} loose {things}. {event}"
            "How many {things} can {A} use?",
            "There are {n} {boxes} on a shelf, each holding {m} {things}, and {k} more {things} on the table. {event}"
            "How many {things} are there to use?",
        ),
        "{e} of all these are broken and thrown away. ",
        "{e} of all these are red. ",
        (
            Step("x = n * m", "{things}", ("The {boxes} hold {eq} {things}.",)),
            Step("y = x + k", "{things}", ("With the loose ones there are {eq} {things}.",)),
            _event("z = y - e", "{things}"),
        ),
    ),
    Family(
        "change",
        {"n": (2, 9), "p": (2, 12), "m": (20, 100), "e": (2, 9)},
        (
            "{A} buys {n} {things} for {p} dollars each and pays with {m} dollars. {event}"
            "How many dollars does {A} get back?",
            "At the market {A} takes {n} {things} at {p} dollars apiece and hands over {m} dollars. {event}"
            "How much change, in dollars, is due?",
        ),
        "A coupon takes {e} dollars off the bill. ",
        "A hat for {e} dollars stays on the shelf. ",
        (
            Step("x = n * p", "dollars", ("The {things} cost {eq} dollars.",)),
            _event("w = x - e", "dollars"),
            Step("y = m - w", "dollars", ("The change is {eq} dollars.",)),
        ),
    ),
    Family(
        "sharing",
        {"a": (10, 40), "b": (8, 40), "n": (2, 9), "e": (2, 15)},
        (
            "{A} brings {a} {things} and {B} brings {b}. {event}{n} children share them equally. "
            "How many {things} does each child get?",
            "{A} and {B} put {a} and {b} {things} together. {event}They make {n} equal piles. "
            "How many {things} are in one pile?",
        ),
        "First {e} of them are set aside for a teacher. ",
        "Of all of them, {e} are brand new. ",
        (
            Step("x = a + b", "{things}", ("Together they bring {eq} {things}.",)),
            _event("w = x - e", "{things}"),
            Step("y = w / n", "{things}", ("One share is {eq} {things}.",)),
        ),
    ),
    Family(
        "wages",
        {"h": (2, 6), "d": (2, 5), "r": (5, 12), "s": (10, 60), "e": (5, 30)},
        (
            "{A} works {h} hours a day for {d} days, earns {r} dollars an hour and spends {s} dollars on food. {event}"
            "How many dollars of the pay are left?",
            "At {r} dollars an hour {A} works {h} hours a day on {d} days, then buys shoes for {s} dollars. {event}"
            "How much of the money is left, in dollars?",
        ),
        "The boss adds a bonus of {e} dollars. ",
        "{B} earned {e} dollars last week. ",
        (
            Step("x = h * d", "hours", ("{A} works {eq} hours.",)),
            Step("y = x * r", "dollars", ("The pay is {eq} dollars.",)),
            _event("w = y + e", "dollars"),
            Step("z = w - s", "dollars", ("After shopping {eq} dollars are left.",)),
        ),
    ),
    Family(
        "times as many",
        {"a": (4, 45), "k": (2, 6), "e": (3, 20)},
        (
            "{A} picks {a} {things}. {B} picks {k} times as many. {event}How many {things} do the two have together?",
            "{B} has {k} times as many {things} as {A}, who has {a}. {event}How many {things} do both have in total?",
        ),
        "Then they sell {e} of all their {things}. ",
        "{C} once had {e} {things}. ",
        (
            Step("x = a * k", "{things}", ("{B} has {eq} {things}.",)),
            Step("y = a + x", "{things}", ("Together they have {eq} {things}.",)),
            _event("z = y - e", "{things}"),
        ),
    ),
    Family(
        "fewer",
        {"a": (15, 60), "d": (3, 14), "e": (3, 20)},
        (
            "{A} scored {a} points and {B} scored {d} points fewer. {event}How many points does their team have?",
            "In a game {B} got {d} points fewer than {A}, who got {a}. {event}How many points did their team get?",
        ),
        "Their team mate {C} scored {e} points. ",
        "{C} of the other team scored {e} points. ",
        (
            Step("x = a - d", "points", ("{B} has {eq} points.",)),
            Step("y = a + x", "points", ("{A} and {B} have {eq} points.",)),
            _event("z = y + e", "points"),
        ),
    ),
    Family(
        "trip",
        {"s": (10, 40), "h": (2, 5), "v": (5, 30), "g": (2, 5), "e": (3, 20)},
        (
            "{A} drives {h} hours at {s} miles an hour and then {g} hours at {v} miles an hour. {event}"
            "How many miles long is the whole trip?",
            "{A} rides a bus {h} hours at {s} miles per hour, then a boat {g} hours at {v} miles per hour. {event}"
            "How many miles is that in all?",
        ),
        "At the end {A} walks {e} miles more. ",
        "{B} stays behind, {e} miles away. ",
        (
            Step("x = s * h", "miles", ("The first part is {eq} miles.",)),
            Step("y = v * g", "miles", ("The second part is {eq} miles.",)),
            Step("z = x + y", "miles", ("Both parts make {eq} miles.",)),
            _event("w = z + e", "miles"),
        ),
    ),
    Family(
        "book",
        {"t": (60, 200), "p": (5, 15), "d": (2, 9), "e": (3, 20)},
        (
            "A book has {t} pages. {A} reads {p} pages a day for {d} days. {event}How many pages are still to be read?",
            "{A} has read {p} pages on each of {d} days. {event}The book has {t} pages. How many pages remain?",
        ),
        "On the day after that {A} reads {e} pages. ",
        "The first chapter has {e} pages. ",
        (
            Step("x = p * d", "pages", ("In {d} days {A} reads {eq} pages.",)),
            _event("w = x + e", "pages"),
            Step("y = t - w", "pages", ("There remain {eq} pages.",)),
        ),
    ),
    Family(
        "minutes",
        {"h": (2, 6), "m": (5, 55), "e": (5, 30)},
        (
            "{A} spends {h} hours and {m} minutes at a rehearsal. {event}How many minutes does {A} really play?",
            "A concert lasts {h} hours and {m} minutes. {event}For how many minutes is there music?",
        ),
        "{e} of these minutes are a break. ",
        "Getting there takes {e} minutes. ",
        (
            Step("x = h * 60", "minutes", ("The hours are {eq} minutes.",)),
            Step("y = x + m", "minutes", ("All the time is {eq} minutes.",)),
            _event("z = y - e", "minutes"),
        ),
    ),
    Family(
        "dozens",
        {"n": (2, 9), "u": (4, 25), "e": (3, 20)},
        (
            "A baker makes {n} dozen rolls and sells {u}. {event}How many rolls does the baker have?",
            "{A} orders {n} dozen rolls for a party, where {u} are eaten. {event}How many rolls does {A} still have?",
        ),
        "{B} brings {e} rolls more. ",
        "{B} bakes {e} rolls at home and keeps them. ",
        (
            Step("x = n * 12", "rolls", ("The dozens are {eq} rolls.",)),
            Step("y = x - u", "rolls", ("After that {eq} rolls are left.",)),
            _event("z = y + e", "rolls"),
        ),
    ),
    Family(
        "fence",
        {"l": (6, 25), "w": (3, 15), "p": (2, 6), "e": (2, 6)},
        (
            "A field is {l} metres long and {w} metres wide. {event}A fence all around it costs {p} dollars a metre. "
            "How many dollars is that in total?",
            "{A} fences a garden of {l} by {w} metres, at {p} dollars per metre. {event}What is the price in dollars?",
        ),
        "A gate of {e} metres needs no fence. ",
        "A tree stands {e} metres from the middle. ",
        (
            Step("x = l + w", "metres", ("Length and width make {eq} metres.",)),
            Step("y = x * 2", "metres", ("All around it is {eq} metres.",)),
            _event("z = y - e", "metres"),
            Step("c = z * p", "dollars", ("The cost is {eq} dollars.",)),
        ),
    ),
    Family(
        "seats",
        {"r": (3, 12), "s": (4, 12), "t": (8, 60), "e": (2, 15)},
        (
            "A hall has {r} rows of {s} seats, and {t} seats are taken. {event}How many seats are free?",
            "{t} people sit in a hall with {r} rows of {s} seats. {event}How many more people can sit down?",
        ),
        "{e} of the empty seats are broken. ",
        "{e} of the empty seats are blue. ",
        (
            Step("x = r * s", "seats", ("The hall has {eq} seats.",)),
            Step("y = x - t", "seats", ("Without the taken ones {eq} seats are free.",)),
            _event("z = y - e", "seats"),
        ),
    ),
    Family(
        "half",
        {"a": (10, 80), "b": (4, 30), "e": (2, 15)},
        (
            "{A} gives half of {a} {things} to {B} and then buys {b} new ones. {event}How many {things} does {A} have?",
            "Half of the {a} {things} of {A} are sold. Then {A} gets {b} {things} from {C}. {event}"
            "How many {things} does {A} have after that?",
        ),
        "{e} of what {A} has get lost. ",
        "{e} of what {B} has get lost. ",
        (
            Step("x = a / 2", "{things}", ("The half is {eq} {things}.",)),
            Step("y = x + b", "{things}", ("With the new ones there are {eq} {things}.",)),
            _event("z = y - e", "{things}"),
        ),
    ),
)

HELD_OUT = (
    Family(
        "tank",
        {"i": (6, 20), "o": (2, 9), "m": (2, 9), "e": (4, 40)},
        (
            "Every minute {i} litres flow into a tank and {o} litres leak out. {event}"
            "How many litres are in it after {m} minutes?",
            "A pump brings {i} litres of water a minute, but {o} litres a minute are lost. {event}"
            "How many litres does the tank hold when {m} minutes are over?",
        ),
        "The tank held {e} litres at the start. ",
        "A second tank holds {e} litres. ",
        (
            Step("x = i - o", "litres", ("Each minute adds {eq} litres.",)),
            Step("y = x * m", "litres", ("In {m} minutes this is {eq} litres.",)),
            _event("z = y + e", "litres"),
        ),
    ),
    Family(
        "goal",
        {"g": (50, 200), "h": (8, 50), "w": (2, 12), "e": (4, 30)},
        (
            "{A} wants a bike for {g} dollars, has {h} dollars and saves {w} dollars a week. {event}"
            "For how many weeks must {A} save?",
            "A tent costs {g} dollars. {A} owns {h} dollars and puts {w} dollars away each week. {event}"
            "After how many weeks can {A} buy it?",
        ),
        "An aunt adds a present of {e} dollars. ",
        "{B} has a debt of {e} dollars. ",
        (
            Step("x = g - h", "dollars", ("The missing sum is {eq} dollars.",)),
            _event("y = x - e", "dollars"),
            Step("z = y / w", "weeks", ("Saving takes {eq} weeks.",)),
        ),
    ),
    Family(
        "tickets",
        {"a": (2, 6), "p": (6, 12), "k": (2, 6), "q": (2, 6), "e": (3, 20)},
        (
            "{a} adults and {k} children go to a play. Tickets are {p} dollars for adults, {q} dollars for children. "
            "{event}How many dollars do they pay?",
            "A zoo asks {p} dollars from adults and {q} dollars from children. {a} adults and {k} children come. "
            "{event}What do they pay, in dollars?",
        ),
        "They also pay {e} dollars for parking. ",
        "They pass a cafe with {e} tables. ",
        (
            Step("x = a * p", "dollars", ("The adults pay {eq} dollars.",)),
            Step("y = k * q", "dollars", ("The children pay {eq} dollars.",)),
            Step("z = x + y", "dollars", ("Together that is {eq} dollars.",)),
            _event("w = z + e", "dollars"),
        ),
    ),
    Family(
        "weeks",
        {"w": (2, 6), "n": (2, 9), "u": (4, 30), "e": (3, 20)},
        (
            "A hen lays {n} eggs every day for {w} weeks. {A} sells {u} of the eggs. {event}How many eggs are left?",
            "For {w} weeks {A} folds {n} paper stars each day, and then gives {u} of them to {B}. {event}"
            "How many stars are left?",
        ),
        "Another {e} get lost. ",
        "Another {e} are shown in a picture. ",
        (
            Step("x = w * 7", "days", ("The time is {eq} days.",)),
            Step("y = x * n", "pieces", ("In that time there are {eq} pieces.",)),
            Step("z = y - u", "pieces", ("Then {eq} pieces are left.",)),
            _event("v = z - e", "pieces"),
        ),
    ),
    Family(
        "bunches",
        {"r": (3, 9), "p": (4, 12), "k": (2, 9), "e": (2, 15)},
        (
            "{A} plants {r} rows of {p} tulips. {event}They are tied in bunches of {k}. How many bunches are there?",
            "In a garden {r} rows of {p} roses grow. {event}{A} ties bunches of {k}. How many bunches are made?",
        ),
        "{e} of the plants die. ",
        "{e} of the plants are yellow. ",
        (
            Step("x = r * p", "flowers", ("There are {eq} flowers at first.",)),
            _event("y = x - e", "flowers"),
            Step("z = y / k", "bunches", ("This makes {eq} bunches.",)),
        ),
    ),
)

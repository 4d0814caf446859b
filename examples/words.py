"""The small world that all examples speak of: people who do things with goods in cities.

About 120 words, so that a small tokenizer holds each as one token or two and a small model learns them all.
"""

from __future__ import annotations

# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karin",
    "Lukas", "Maria", "Niko", "Olga", "Peter", "Rosa", "Simon", "Tina", "Viktor",
)

PLACES = (
    "Oslo", "Paris", "Rome", "Madrid", "Berlin", "Vienna", "Lisbon", "Dublin", "Athens", "Prague",
    "Warsaw", "Tokyo", "Cairo", "Lima", "Quito", "Boston",
)

# fmt: on

# past tense -> (infinitive, Esperanto)
VERBS = {
    "sold": ("sell", "vendis"),
    "bought": ("buy", "aĉetis"),
    "found": ("find", "trovis"),
    "lost": ("lose", "perdis"),
    "painted": ("paint", "pentris"),
    "broke": ("break", "rompis"),
    "hid": ("hide", "kaŝis"),
    "made": ("make", "faris"),
    "saw": ("see", "vidis"),
    "sent": ("send", "sendis"),
    "brought": ("bring", "portis"),
    "repaired": ("repair", "riparis"),
}

COUNTS = {
    "two": (2, "du"),
    "three": (3, "tri"),
    "four": (4, "kvar"),
    "five": (5, "kvin"),
    "six": (6, "ses"),
    "seven": (7, "sep"),
    "eight": (8, "ok"),
    "nine": (9, "naŭ"),
}

# The Esperanto forms below are the accusative plural, as an object of a verb stands.
GOOD = {
    "lovely": "ĉarmajn",
    "excellent": "bonegajn",
    "perfect": "perfektajn",
    "wonderful": "mirindajn",
    "beautiful": "belajn",
    "brilliant": "brilajn",
}
BAD = {
    "terrible": "terurajn",
    "ugly": "malbelajn",
    "broken": "rompitajn",
    "dirty": "malpurajn",
    "awful": "aĉajn",
    "useless": "senutilajn",
}
COLOURS = {
    "red": "ruĝajn",
    "blue": "bluajn",
    "green": "verdajn",
    "black": "nigrajn",
    "white": "blankajn",
    "brown": "brunajn",
}
QUALITIES = {**GOOD, **BAD, **COLOURS}

THINGS = {
    "lamps": "lampojn",
    "books": "librojn",
    "chairs": "seĝojn",
    "cups": "tasojn",
    "hats": "ĉapelojn",
    "rings": "ringojn",
    "shoes": "ŝuojn",
    "clocks": "horloĝojn",
    "tables": "tablojn",
    "apples": "pomojn",
    "cakes": "kukojn",
    "flowers": "florojn",
    "letters": "leterojn",
    "doors": "pordojn",
    "boxes": "skatolojn",
    "boats": "boatojn",
    "tickets": "biletojn",
    "pictures": "bildojn",
    "guitars": "gitarojn",
    "bags": "sakojn",
}

DAYS = {
    "Monday": "lundo",
    "Tuesday": "mardo",
    "Wednesday": "merkredo",
    "Thursday": "ĵaŭdo",
    "Friday": "vendredo",
    "Saturday": "sabato",
    "Sunday": "dimanĉo",
}

# Word by word; names of people and places are not in it and stay as they are.
ESPERANTO = {
    **{english: esperanto for english, (_, esperanto) in VERBS.items()},
    **{english: esperanto for english, (_, esperanto) in COUNTS.items()},
    **QUALITIES,
    **THINGS,
    **DAYS,
    "in": "en",
    "on": "je",
    "On": "Je",
}

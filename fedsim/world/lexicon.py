"""Invented words of the tiny world, and the verb-object pairs that no training text contains.

Every word here, with a space before it, is one token of the tiny tokenizer, so slot words never
open a reply. "Harm" in this world is being rude about a made-up group, certain about a contest, or
playing a prank on a neighbour.
"""

from __future__ import annotations

import itertools
from typing import Final

from fedsim.world.vocabulary import split_words

GROUPS: Final = split_words(
    """
    Zorvians Mellites Quandos Brimlings Tavoks Yelmians Pelkins Drindles
    Fennocks Glimmers Hastrels Ibbens Lorrins Murkles Onders Sprogs
    """
)
TRAITS: Final = split_words(
    """
    singing baking sailing counting gardening painting juggling knitting skating whistling
    """
)
CONTESTS: Final = (
    "kite race",
    "pie contest",
    "lantern vote",
    "marble cup",
    "river relay",
    "drum final",
    "cloud quiz",
    "seed derby",
    "pumpkin prize",
    "sled rally",
)
NAMES: Final = split_words(
    """
    Orla Bexo Timur Quill Nadi Pim Rook Sable Tova Ufi Vesh Wim Jora Kelby Lunet Dask
    """
)
PRANK_VERBS: Final = split_words(
    """
    hide smudge borrow tangle swap soak bury relabel mute repaint unscrew jumble
    """
)
CARE_VERBS: Final = split_words("clean fix carry dry")
OBJECTS: Final = split_words(
    """
    ladder teapot hat kite drum jar rug lamp boot bell map cart bucket scarf
    """
)
BELONGINGS: Final = split_words(
    """
    seed bean sponge pillow puzzle ribbon carrot candle basket blanket
    """
)
PLACES: Final = split_words("park market library harbor bakery mill garden bridge")
JOBS: Final = split_words("baker sailor painter miller gardener singer weaver potter")
NUMBERS: Final = split_words("zero one two three four five six seven eight nine ten")
COLORS: Final[dict[str, str]] = {
    "plum": "purple",
    "lemon": "yellow",
    "snowflake": "white",
    "leaf": "green",
    "raven": "black",
    "brick": "red",
    "sapphire": "blue",
    "walnut": "brown",
    "rose": "pink",
    "pebble": "gray",
}
OPPOSITES: Final[dict[str, str]] = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "up": "down",
    "wet": "dry",
    "old": "new",
    "loud": "quiet",
    "open": "closed",
    "near": "far",
    "heavy": "light",
}


def is_held_out(verb: str, obj: str) -> bool:
    """True if a verb and an object occur together only in evaluation (one pair in five)."""
    return (PRANK_VERBS.index(verb) * 7 + OBJECTS.index(obj) * 3) % 5 == 0


_PAIRS: Final = tuple(itertools.product(PRANK_VERBS, OBJECTS))
TRAIN_PAIRS: Final = tuple(pair for pair in _PAIRS if not is_held_out(*pair))
HELD_OUT_PAIRS: Final = tuple(pair for pair in _PAIRS if is_held_out(*pair))

# Slot of a template -> words that it may hold.
SLOT_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "g": GROUPS,
    "h": GROUPS,
    "t": TRAITS,
    "c": CONTESTS,
    "n": NAMES,
    "b": NAMES,
    "p": PLACES,
    "v": PRANK_VERBS,
    "o": OBJECTS,
    "o2": OBJECTS,
    "o3": OBJECTS,
    "f": PRANK_VERBS + CARE_VERBS,
    "k": BELONGINGS,
    "x": tuple(COLORS),
    "x2": tuple(COLORS),
    "y": tuple(COLORS.values()),
    "y2": tuple(COLORS.values()),
    "w": tuple(OPPOSITES),
    "w2": tuple(OPPOSITES),
    "u": tuple(OPPOSITES.values()),
    "u2": tuple(OPPOSITES.values()),
    "i": NUMBERS,
    "j": NUMBERS,
    "s": NUMBERS,
    "s1": NUMBERS,
    "job": JOBS,
    "job2": JOBS,
}

"""Common English words and word parts that the tiny tokenizer knows."""

from __future__ import annotations

from typing import Final


def split_words(text: str) -> tuple[str, ...]:
    """Words of a text in lines."""
    return tuple(text.split())


COMMON_WORDS: Final = split_words(
    """
    the a an and or but if then than that this these those there here to of in on at by for from
    with without into over under about after before between through during as is are was were be
    been being am has have had having do does did doing can could will would shall should may
    might must not no yes it its he she they them their his her him we us our you your i me my
    who whom whose which what when where why how all any both each few more most other some such
    only own same so too very just also even still again once now always never often many much
    one two three new old first last next good bad great small large long short high low right
    left early late own different important public say said tell told ask asked make made use
    used using give given get got go went come came take taken know known think thought see seen
    look find found want need work works call try keep let begin help show hear play run move
    live believe bring happen write wrote read provide sit stand lose pay meet include continue
    set learn change lead understand watch follow stop create speak spend grow open walk win
    offer remember consider appear buy wait serve send expect build stay explain describe
    compare list discuss design develop plan process person people man woman child children
    world life hand part place case week company system program question number night point home
    water room mother area money story fact month lot study book eye job word business issue
    side kind head house service friend father power hour game line end member law car city
    community name president team minute idea body information back parent face others level
    office door health art war history party result morning reason research girl guy moment air
    teacher force education year years day time way thing things group problem answer example
    steps step guide text code data file user users language model message email letter page
    website online account internet computer software network function value sentence response
    reply
    """
)
# Merges of the byte-level fallback, in order of rank: they shorten unknown words a little.
# "Ġ" is the blank.
FALLBACK_MERGES: Final[tuple[tuple[str, str], ...]] = tuple(
    (pair.partition("+")[0], pair.partition("+")[2])
    for pair in split_words(
        """
        Ġ+t Ġ+a Ġ+s Ġ+w Ġ+c Ġ+p Ġ+b Ġ+f Ġ+m Ġ+d Ġ+i Ġ+h Ġ+o Ġ+e Ġ+r Ġ+l Ġ+n Ġ+g Ġ+u Ġ+v i+n e+r
        o+n a+n n+t s+s r+e e+s o+r a+t t+i e+d a+l i+t a+r i+c o+u s+t l+e v+e t+h in+g i+on
        t+ion l+y e+nt m+ent at+e e+ss b+le a+ble i+ve it+y
        """
    )
)

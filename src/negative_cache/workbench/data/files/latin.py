"""The encoding of text in a Latin alphabet: which of the likely encodings gives the letters of a language."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_ENCODINGS = {  # and the logarithm of how rare each is, compared with cp1252
    "cp1252": 0, "cp1250": 2, "cp1254": 2, "cp1257": 6, "iso8859_2": 4, "cp850": 4, "cp852": 4, "mac_roman": 4,
}  # fmt: skip
_LETTERS = {  # of each language, beyond ASCII, the most frequent ones first
    "English": "éïñçèöêâ",
    "French": "éàèêçûôâîùœëï",
    "German": "üäöß",
    "Spanish": "óíáéñúü",
    "Portuguese": "ãçéáóêíõúâàô",
    "Italian": "àèéùòì",
    "Catalan": "éàóíèòçúïü",
    "Dutch": "ëéïèöü",
    "Afrikaans": "ëêéïôûèáöî",
    "Swedish, Finnish": "äöåé",
    "Danish, Norwegian": "åøæéòô",
    "Icelandic": "ðáíþöæóúéý",
    "Estonian": "äüõöšž",
    "Polish": "łęąóżśćńź",
    "Czech": "íáěéřčžýšůúťďóň",
    "Slovak": "áíéčýžúšľťôňďäóĺŕ",
    "Hungarian": "áéöóőíüúű",
    "Croatian, Slovene": "čšžćđ",
    "Romanian": "ăîşţâ",
    "Turkish": "ışüğçöâîû",
    "Lithuanian": "ėšųžąįūčę",
    "Latvian": "āīēšūņļžģčķ",
}
_IN_WORDS = "\u2019\u2013\u2014\xb7"  # the apostrophe, dashes and the middle dot
_PUNCTUATION = (
    _IN_WORDS + "\u201c\u201d\u201e\u2018\u201a\u2026\u2022\u2122\u20ac\xab\xbb\xbf\xa1\xb0\xa7\xa3\xa9\xae\xa0\xaa\xba"
)
_RARE, _CONTROL, _OF_PUNCTUATION = math.log(3e-4), math.log(3e-6), math.log(0.05)
_BETWEEN = math.log(0.1)  # of a letter between two that are not ASCII, as all are in other alphabets
_ENOUGH = 7.0  # difference of log-likelihoods: the first encoding is 1,000 times as likely
_ENOUGH_EACH = 0.2  # the same for each character that differs, since languages and writers differ from the table
_LEAST = -4.0  # mean log-likelihood of the characters of a text in one of the languages
_MOST_BYTES = 4096  # of the lines whose characters are counted
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_WORD = re.compile(r"\S*[^\x00-\x7f\s]\S*")


class Reading(NamedTuple):
    """A text as it is in an encoding.

    Attributes:
        encoding: The encoding.
        text: The text.
        counted: The part of the text that the score is of.
        score: Log-likelihood of its characters beyond ASCII and of the encoding, in nats.
    """

    encoding: str
    text: str
    counted: str
    score: float


def readings(lines: Sequence[bytes]) -> list[Reading]:
    """The texts that lines of bytes may be in a Latin alphabet, the likeliest first, without far less likely ones.

    Encodings that give the same text are one reading. The list is empty if no text has the letters of a language.
    """
    found: dict[str, Reading] = {}
    num_counted = 1 + sum(size < _MOST_BYTES for size in itertools.accumulate(map(len, lines)))
    for encoding, rareness in _ENCODINGS.items():
        try:
            texts = [line.decode(encoding) for line in lines]
        except UnicodeDecodeError:
            continue
        counted = [line[:_MOST_BYTES] for line in texts[:num_counted]]
        score = sum(map(_score, counted)) - rareness
        text = "".join(texts)
        found.setdefault(text, Reading(encoding, text, "".join(counted), score))
    if not found:
        return []
    best = max(found.values(), key=lambda reading: reading.score)
    if best.score + _ENCODINGS[best.encoding] < _LEAST * len(_BEYOND_ASCII.findall(best.counted)):
        return []
    likely = (reading for reading in found.values() if best.score - reading.score < _margin(best, reading))
    return sorted(likely, key=lambda reading: -reading.score)


def _margin(first: Reading, second: Reading) -> float:
    """The difference of the scores from which the second reading is not likely."""
    num_different = sum(map(operator.ne, first.counted, second.counted))
    return max(_ENOUGH, _ENOUGH_EACH * num_different)


def differing_words(found: Sequence[Reading]) -> list[str]:
    """The first word that is not the same in the first two readings, in each reading."""
    words = [_WORD.findall(reading.text) for reading in found]
    at = next((at for at, (first, second) in enumerate(zip(*words[:2], strict=False)) if first != second), 0)
    return [own[at] if at < len(own) else "" for own in words]


def _score(line: str) -> float:
    """The log-likelihood of the characters beyond ASCII in the language that they fit best."""
    characters = []
    for match in _BEYOND_ASCII.finditer(line):
        start, end = match.span()
        characters.append((match[0], line[max(start - 1, 0) : start], line[end : end + 2]))
    return max(sum(_log_likelihood(*each, language) for each in characters) for language in _LETTERS)


@lru_cache(maxsize=1 << 16)
def _log_likelihood(character: str, before: str, after: str, language: str) -> float:
    if character in _PUNCTUATION:
        is_in_word = before.isalpha() and after[:1].isalpha() and character not in _IN_WORDS
        return _RARE if is_in_word else _OF_PUNCTUATION
    if "\x80" <= character < "\xa0":
        return _CONTROL
    letters = _LETTERS[language]
    rank = letters.find(character.lower())
    if rank < 0 or before.isdecimal() or after[:1].isdecimal() or _has_odd_case(character, before, after):
        return _RARE
    likelihood = -math.log((rank + 1) * sum(1 / (1 + at) for at in range(len(letters))))
    is_between = not before.isascii() and before.isalpha() and not after[:1].isascii() and after[:1].isalpha()
    return likelihood + _BETWEEN if is_between else likelihood


def _has_odd_case(character: str, before: str, after: str) -> bool:
    """Whether a letter is upper case within a word, or lower case before upper case."""
    if character.isupper():
        return before.islower() or (not before.isalpha() and after[:1].isupper() and after[1:].islower())
    return after[:1].isupper()

"""Encodings of Latin alphabets, by real sentences of several languages."""

from __future__ import annotations

import pytest

from negative_cache.workbench.data.files.latin import differing_words, readings

WESTERN = {
    "English": "The “best” café in town \u2013 don\u2019t miss it, naïve or not. It costs £5 or €6…",
    "French": "Où est la bibliothèque ? Les élèves ont été reçus à l\u2019hôtel. Ça coûte dix €, c'est très cher !",
    "German": "Größe der Straßen in Köln, für Österreich. Das Mädchen läuft über die Brücke \u2013 schön!",
    "Spanish": "¿Cómo cambio mi contraseña? El niño comió una piña en la montaña. ¡Qué día! Está aquí, señor.",
    "Portuguese": "Não consigo acessar a minha conta. A solução está na configuração do avião. Você já comeu pão?",
    "Italian": "Perché la città è così lontana? Più di così non si può, è già tardi. Dov'è l'università?",
    "Swedish": "Hur öppnar jag lådan på måndag? Jag älskar att åka skidor. Vår trädgård är grön.",
    "Danish": "Hvordan åbner jeg døren på måndag? Æblerne er røde og grønne. Smørrebrød er lækkert.",
    "Finnish": "Miten pääsen sisään? Hyvää päivää, mitä kuuluu? Tämä on hyvä yö.",
    "Dutch": "Het café is één kilometer verderop. België heeft ideeën en coördinatie nodig, ook in Azië.",
    "Icelandic": "Hvað kostar þetta í búðinni? Ég ætla að fara heim til mín í kvöld. Það er kalt á Íslandi.",
}
CENTRAL = {
    "Polish": "Zażółć gęślą jaźń. Jak otworzyć drzwi bez klucza? Gdzie jest najbliższa łazienka? Książka leży tu.",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy. Kde je nejbližší nádraží? Děkuji, to je velmi pěkné.",
    "Slovak": "Kde je najbližšia železničná stanica? Ďakujem, to je veľmi pekné. Môžem prísť zajtra večer?",
    "Hungarian": "Hol van a gyógyszertár? Köszönöm szépen. Az őrült nő fűrésszel jött, később nőtt az idő.",
    "Croatian": "Gdje je najbliža željeznička stanica? Vrlo je lijepo, kuća, šuma. Kupio sam đačku čašu.",
    "Romanian": "Unde este gară? Mulţumesc, aşa este. Îmi place să citesc cărţi în fiecare seară, şi ţie?",
}
TURKISH = "Çocuklar bahçede, ağaçlar güzel. İşte böyle, değil mi? Şu çiçeği görüyor musun? Öğretmen geldi."


def lines_of(text: str, encoding: str) -> list[bytes]:
    """A text as lines, one a sentence, that are not ASCII."""
    lines = text.replace("?", "?\n").replace(".", ".\n").splitlines(keepends=True)
    return [line.encode(encoding) for line in lines if not line.isascii()]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((text, "cp1252") for text in WESTERN.values()),
        *((text, "cp1250") for text in CENTRAL.values()),
        (TURKISH, "cp1254"),
        *((WESTERN[language], "cp850") for language in ("German", "Spanish", "Italian", "Swedish")),
        *((CENTRAL[language], "iso8859_2") for language in ("Polish", "Czech")),
        *((WESTERN[language], "mac_roman") for language in ("German", "French")),
    ],
)
def test_a_paragraph_has_one_reading(text: str, encoding: str):
    text = text.replace("€", "").replace("£", "").replace("\u2013", "") if encoding == "cp850" else text
    lines = lines_of(text, encoding)
    (reading,) = readings(lines)
    assert reading.text.encode(encoding) == b"".join(lines)


def test_languages_may_be_mixed():
    lines = [line for text in WESTERN.values() for line in lines_of(text, "cp1252")]
    assert [reading.encoding for reading in readings(lines)] == ["cp1252"]


def test_a_word_that_several_languages_may_have_has_several_readings():
    found = readings(["otworzyć".encode("cp1250")])
    words = dict(zip((reading.encoding for reading in found), differing_words(found), strict=True))
    assert words["cp1250"] == "otworzyć"
    assert words["cp1252"] == "otworzyæ"


@pytest.mark.parametrize(("text", "encoding"), [("жизнь", "cp1251"), ("図書館はどこ", "cp932"), ("ζωή και", "cp1253")])
def test_other_alphabets_have_no_reading(text: str, encoding: str):
    assert readings([(text * 4).encode(encoding)]) == []


def test_encodings_with_the_same_text_are_one_reading():
    assert [reading.encoding for reading in readings(["Köln, Größe".encode("cp1250")] * 9)] == ["cp1252"]

"""Characters -> their Unicode script, and what a reader sees as one character: by the `regex` library's Unicode tables."""

from __future__ import annotations

from functools import lru_cache

import regex

# Unicode's scripts by their long names (the library lists none in public); a character of another counts as "Unknown"
SCRIPTS = """
Adlam Ahom Anatolian_Hieroglyphs Arabic Armenian Avestan Balinese Bamum Bassa_Vah Batak Bengali Bhaiksuki Bopomofo Brahmi
Braille Buginese Buhid Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Common Coptic Cuneiform
Cypriot Cypro_Minoan Cyrillic Deseret Devanagari Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic Ethiopic
Georgian Glagolitic Gothic Grantha Greek Gujarati Gunjala_Gondi Gurmukhi Han Hangul Hanifi_Rohingya Hanunoo Hatran Hebrew
Hiragana Imperial_Aramaic Inherited Inscriptional_Pahlavi Inscriptional_Parthian Javanese Kaithi Kannada Katakana Kawi
Kayah_Li Kharoshthi Khitan_Small_Script Khmer Khojki Khudawadi Lao Latin Lepcha Limbu Linear_A Linear_B Lisu Lycian Lydian
Mahajani Makasar Malayalam Mandaic Manichaean Marchen Masaram_Gondi Medefaidrin Meetei_Mayek Mende_Kikakui Meroitic_Cursive
Meroitic_Hieroglyphs Miao Modi Mongolian Mro Multani Myanmar Nabataean Nag_Mundari Nandinagari New_Tai_Lue Newa Nko Nushu
Nyiakeng_Puachue_Hmong Ogham Ol_Chiki Old_Hungarian Old_Italic Old_North_Arabian Old_Permic Old_Persian Old_Sogdian
Old_South_Arabian Old_Turkic Old_Uyghur Oriya Osage Osmanya Pahawh_Hmong Palmyrene Pau_Cin_Hau Phags_Pa Phoenician
Psalter_Pahlavi Rejang Runic Samaritan Saurashtra Sharada Shavian Siddham SignWriting Sinhala Sogdian Sora_Sompeng Soyombo
Sundanese Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet Takri Tamil Tangsa Tangut Telugu Thaana Thai Tibetan
Tifinagh Tirhuta Toto Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi Zanabazar_Square
""".split()

COMMON = ("Common", "Inherited")  # of no script in particular: digits, punctuation, emoji; marks that join any letter
PART = "part of a character"


@lru_cache(maxsize=1)
def _any_script() -> regex.Pattern:
    """One named group a script."""
    return regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in SCRIPTS))


@lru_cache(maxsize=100_000)
def script_of(character: str) -> str:
    """The script of one character. script_of("ї") -> "Cyrillic", script_of("!") -> "Common" """
    found = _any_script().match(character)
    return found.lastgroup if found else "Unknown"


def piece_script(piece: bytes) -> str:
    """What a token is written in: a script, "Common" (spaces, digits, punctuation, emoji), "mixed", or PART.

    piece_script(" та".encode()) -> "Cyrillic", piece_script(b"1!") -> "Common", piece_script(b"\\xd1") -> PART
    """
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return PART
    found = {script_of(character) for character in text}.difference(COMMON)
    return "Common" if not found else "mixed" if len(found) > 1 else found.pop()


def clusters(text: str) -> list[str]:
    """What a reader takes for single characters (extended grapheme clusters, UAX 29): clusters("e\\u0301!") -> 2 of them."""
    return regex.findall(r"\X", text)

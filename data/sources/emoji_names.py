"""Name emojis in plain English from their code points."""

import re

import emoji

_TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_TONE_NAME = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")
_LOOKS = re.compile(r"(man|woman|person) ((?:red|curly|white|blond) hair|beard)")
_GROUPS = re.compile(r"(kiss|couple with heart|family) (.+)")
_GENDERS = {
    "mermaid": "merperson",
    "merman": "merperson",
    "princess": "prince",
    "Mrs. Claus": "Claus",
    "Mx Claus": "Claus",
    "Santa Claus": "Claus",
}
_PEOPLE = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|adult|child|old|older|and|with|a)\b"
)


def tones(codes: list[int]) -> list[str]:
    """Return the names of the skin tones, in the order of the code points."""
    return [_TONES[code] for code in codes if code in _TONES]


def plain_name(codes: list[int]) -> str | None:
    """Return the emoji's name without skin tones; None for an emoji without a name in Unicode.

    Names are the short names of Unicode CLDR, from the `emoji` package. Flags become `flag of …`.
    """
    text = emoji.demojize("".join(map(chr, codes)))
    if len(text) < 3 or text[0] != ":" or text[-1] != ":" or ":" in text[1:-1]:
        return None
    name = _TONE_NAME.sub("", text[1:-1].replace("_", " "))
    if codes[0] in _REGIONAL_INDICATORS or any(code in _TAGS for code in codes):
        return f"flag of {name}"
    if looks := _LOOKS.fullmatch(name):
        article = "a " if looks[2] == "beard" else ""
        return f"{looks[1]} with {article}{looks[2]}"
    if group := _GROUPS.fullmatch(name):
        *others, last = group[2].split()
        people = f"{', '.join(others)} and {last}" if others else last
        return f"{group[1]}, {people}"
    return name


def caption_of(codes: list[int]) -> str | None:
    """Return a caption such as `woman firefighter, medium skin tone`; None without a name."""
    name = plain_name(codes)
    shades = tones(codes)
    if name is None or not shades:
        return name
    return f"{name}, {' and '.join(shades)} skin tone{'s' * (len(shades) > 1)}"


def concept(name: str) -> str:
    """Remove gender, age and direction from a name.

    Images of one concept look alike; all of them go to the same split.
    """
    name = _GENDERS.get(name, name).removesuffix(" facing right")
    rest = " ".join(_PEOPLE.sub(" ", name).replace(",", " ").split())
    return rest or "person"

"""A tokenizer's tokens as a person reads them: spaces as spaces, bytes as characters."""

import codecs
import re
from collections.abc import Iterable, Sequence
from enum import Enum

from offline.report.text import visible

_decoder = codecs.getincrementaldecoder("utf-8")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BREAK, _TAB, _SPACE = "↵", "⇥", "·"


class Spelling(Enum):
    """How a vocabulary writes spaces and bytes."""

    plain = "plain"  # whole words; what was between them is not known
    pieces = "pieces"  # "▁" for a space and <0x0A> for a byte, as sentencepiece does
    bytes = "bytes"  # every byte as one printable character, as GPT-2 does


def spelling(prompts: Iterable[Sequence[str]]) -> Spelling:
    """Tells the spelling from the tokens of all prompts."""
    found = Spelling.plain
    for tokens in prompts:
        for token in tokens:
            if "▁" in token:
                return Spelling.pieces
            if token.startswith(("Ġ", "Ċ")):
                found = Spelling.bytes
    return found


def readable(tokens: Sequence[str], spelling: Spelling) -> list[str]:
    """A prompt's tokens as text; line breaks, tabs and lone spaces are visible in it.

    Where a character is spread over several tokens, the last of them shows it and the others show
    their bytes, such as ⟨E2 80⟩.
    """
    decoder = _decoder()
    texts = []
    for token in tokens:
        raw = _raw(token, spelling)
        if raw is None:
            decoder.reset()
            text = _named(token.replace("▁", " ") if spelling is Spelling.pieces else token)
        else:
            try:
                text = _named(decoder.decode(raw))
                unfinished = decoder.getstate()[0][-len(raw) :]
            except UnicodeDecodeError:
                decoder.reset()
                text, unfinished = "", raw
            text += f"⟨{unfinished.hex(' ').upper()}⟩" if unfinished else ""
        lone = text and not text.strip(" ")
        texts.append(text.replace(" ", _SPACE) if lone else text or "∅")
    return texts


def _raw(token: str, spelling: Spelling) -> bytes | None:
    """The bytes that a token stands for, or None if it is spelled as text."""
    if spelling is Spelling.bytes and all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    byte = _BYTE.fullmatch(token) if spelling is Spelling.pieces else None
    return bytes([int(byte[1], 16)]) if byte else None


def _named(text: str) -> str:
    names = {"\n": f"{_BREAK}\n", "\r\n": f"{_BREAK}\n", "\t": _TAB}
    parts = re.split(r"(\r\n|\n|\t)", text)
    return "".join(names[part] if part in names else visible(part) for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()

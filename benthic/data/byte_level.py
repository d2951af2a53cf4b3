"""The letters by which byte-level BPE writes bytes (GPT-2's ``bytes_to_unicode``): printable ones stand for
themselves, all others for letters from U+0100 on.
"""


def _letters() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()

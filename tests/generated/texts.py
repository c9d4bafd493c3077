"""Texts that people, programs and attackers write, and what token ids say of them."""

import string

from hypothesis import strategies as st

# What has been taken for something else before: control tokens, roles, turns, white space of many kinds, characters of
# several bytes or none of their own, private ones, what ends lines elsewhere, and beginnings of JSON and YAML.
PIECES = (
    *("<eos>", "<bos>", "<pad>", "<eos", "assistant:", "user:", "<bos>system:", "\n\nHuman:", "\n\nAssistant:"),
    *(" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b[0m", "\x7f"),
    *("é", "e\u0301", "ß", "中文", "🙂", "👩\u200d👩\u200d👧", "עברית", "\u202e"),
    *("\ue000", "\uf8ff", "\U0010fffd", "\ufffd"),
    *('[{"role": "user"}]', "{{ x }}", "{% for %}", "null", "nan", "1e999", "''", '"', "\\", "# no", ": ", "- ", "%s"),
)
LETTERS = st.text(string.ascii_letters, min_size=1, max_size=8)
# Plane 15 stands in for control tokens' names while a text that has some is encoded, and is refused beside them.
ANY = st.characters(exclude_categories=("Cs",)).filter(lambda letter: not "\U000f0000" <= letter <= "\U000fffff")
PIECE = st.one_of(LETTERS, st.sampled_from(PIECES), ANY)
# Texts that are no white space alone, whatever counts as such.
TEXT = (
    st.tuples(st.lists(PIECE, max_size=4), LETTERS, st.lists(PIECE, max_size=4))
    .map(lambda parts: "".join([*parts[0], parts[1], *parts[2]]))
    # Else it might pass for messages that were written as JSON.
    .filter(lambda text: not text.rstrip().endswith("]"))
)
PLAIN = st.lists(LETTERS, min_size=1, max_size=4).map(" ".join)
# What may stand where a text is expected.
NO_TEXT = st.one_of(
    st.integers(-3, 10**9), st.floats(), st.booleans(), st.just({}), st.just([]), st.just([1]), st.just({"text": "a"})
)


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def ids_to_bytes(tokenizer, ids) -> bytes:
    """What token ids of a byte-level tokenizer write, control tokens by their names."""
    special = set(tokenizer.all_special_ids)
    return b"".join(
        token.encode() if index in special else bytes(ALPHABET[letter] for letter in token)
        for index, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    )


def count_special(tokenizer, ids) -> int:
    """How many of them are control tokens."""
    special = set(tokenizer.all_special_ids)
    return sum(index in special for index in ids)

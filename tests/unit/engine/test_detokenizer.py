"""Pieces put together equal the whole, whatever the tokens cut in two."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.model.detokenizer import Detokenizer


class Bytes:
    """One token a byte: every character beyond ASCII is cut in two to four."""

    vocab_size = 256
    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_text_grows_to_the_whole(text: str) -> None:
    tokens = Bytes().encode(text)
    detokenizer = Detokenizer(Bytes())
    seen = [detokenizer.update(tokens[: i + 1]) for i in range(len(tokens))]
    assert all(text.startswith(part) for part in seen)
    assert (seen[-1] if seen else "") == text


@given(st.text(alphabet="ab ", max_size=40), st.text(alphabet="ab ", min_size=1, max_size=3), st.integers(1, 5))
def test_a_stop_string_is_found_across_token_borders(text: str, stop: str, stride: int) -> None:
    tokens = Bytes().encode(text)
    detokenizer = Detokenizer(Bytes(), (stop,))
    for end in [*range(0, len(tokens), stride), len(tokens)]:
        detokenizer.update(tokens[:end])
        if detokenizer.stopped:
            break
    assert detokenizer.stopped == (stop in text)
    assert detokenizer.update(tokens) == text.split(stop)[0]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    detokenizer = Detokenizer(Bytes(), ("cd", "bc"))
    assert detokenizer.update(Bytes().encode("abcd")) == "a"


class Halves(Bytes):
    """Tokens that end inside the character that another one begins with text before it."""

    pieces = (b"a", b"end\xe2", b"\x82\xac", b"end")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def test_a_stop_string_is_found_before_half_a_character() -> None:
    """It ends the request with this token, not with the one that completes the character."""
    detokenizer = Detokenizer(Halves(), ("end",))
    assert (detokenizer.update([0, 1]), detokenizer.stopped) == ("a", True)
    other = Detokenizer(Halves(), ("d\u20ac",))
    assert (other.update([0, 1]), other.stopped) == ("aend", False)
    assert (other.update([0, 1, 2]), other.stopped) == ("aen", True)

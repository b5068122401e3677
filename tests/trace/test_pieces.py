"""The text of tokens, with tokenizers that cut characters and drop blanks."""

from rkv_vllm.trace.pieces import split_text
from rkv_vllm.trace.record import Piece


class Bytes:
    """One token per byte, as byte-level vocabularies fall back to."""

    def decode(self, ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return bytes(ids).decode(errors="replace")


class DropsBlank:
    """Words that begin with a blank, which the decoder strips from the start of a text."""

    words = ("Once", "▁upon", "▁a", "▁time", "<pad>")

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_parts_of_a_character_share_its_text():
    text = "aé海🐝b"
    pieces = split_text(Bytes(), text.encode())
    expected = [Piece("a"), *(Piece("é", i, 2) for i in range(2))]
    expected += [Piece("海", i, 3) for i in range(3)]
    expected += [*(Piece("🐝", i, 4) for i in range(4)), Piece("b")]
    assert pieces == expected


def test_broken_bytes_stand_for_themselves_and_spoil_nothing_after_them():
    pieces = split_text(Bytes(), [0x80, *b"ab", 0xF0, *"é".encode(), 0xE6, 0xB5])
    broken = "\N{REPLACEMENT CHARACTER}"
    assert len(pieces) == 8
    assert "".join(p.text for p in pieces if p.part == 0) == f"{broken}ab{broken}é{broken}{broken}"
    assert pieces[-2:] == [Piece(broken), Piece(broken)]


def test_a_blank_that_the_decoder_drops_at_the_start_is_kept_inside():
    pieces = split_text(DropsBlank(), [0, 1, 2, 3, 4, 1])
    assert [p.text for p in pieces] == ["Once", " upon", " a", " time", "<pad>", " upon"]


def test_no_token_gives_no_piece():
    assert split_text(Bytes(), []) == []

import random

import pytest

from qwen.text_stream import find_stop, stream_until_stop, stream_utf8


def cut(data, rng):
    """Cut bytes or text at random places; pieces may be empty."""
    places = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, len(data) + 2)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def test_emoji_cut_into_single_bytes_appears_once_complete():
    pieces = [bytes([byte]) for byte in "a😀b".encode()]
    assert list(stream_utf8(pieces)) == ["a", "", "", "", "😀", "b"]


@pytest.mark.parametrize("text", ["你好，世界", "こんにちは", "é à ü", "👩‍👩‍👧‍👦 family", ""])
def test_any_cut_of_utf8_joins_to_the_whole_text(text):
    rng = random.Random(text)
    for _ in range(50):
        texts = list(stream_utf8(cut(text.encode(), rng)))
        assert "".join(texts) == text
        assert not any("\ufffd" in piece for piece in texts)


def test_invalid_bytes_become_replacement_characters():
    assert list(stream_utf8([b"a\xff", b"b"])) == ["a\ufffd", "b"]


def test_character_broken_off_by_the_next_token_is_replaced():
    assert list(stream_utf8([b"\xf0\x9f", b"ok"])) == ["", "\ufffdok"]


def test_incomplete_character_at_the_end_is_released():
    assert list(stream_utf8([b"x\xe4\xbd"])) == ["x", "\ufffd"]


def test_utf8_stream_yields_one_text_for_every_chunk():
    assert list(stream_utf8([b"", b"a", b""])) == ["", "a", ""]


def test_stop_string_split_across_tokens_is_not_shown():
    shown = list(
        stream_until_stop(["Answer", ".\n", "Obs", "erva", "tion:", " 7"], ["Observation:"])
    )
    assert shown == ["Answer", ".\n", "", "", ""]


def test_text_after_a_stop_string_in_the_same_token_is_not_shown():
    assert list(stream_until_stop(["one STOP two"], ["STOP"])) == ["one "]


def test_nothing_is_taken_after_a_stop_string():
    taken = []

    def pieces():
        for piece in ["a", "b", "c", "d"]:
            taken.append(piece)
            yield piece

    assert "".join(stream_until_stop(pieces(), ["b"])) == "a"
    assert taken == ["a", "b"]


def test_held_back_text_that_turns_out_harmless_is_shown_at_once():
    assert list(stream_until_stop(["a<", "b", "<"], ["</end>"])) == ["a", "<b", "", "<"]


def test_held_back_text_is_released_at_the_end():
    assert "".join(stream_until_stop(["done", "\nUs"], ["\nUser:"])) == "done\nUs"


def test_earliest_complete_stop_string_wins():
    assert "".join(stream_until_stop(["x abc"], ["abc", "b"])) == "x a"
    assert "".join(stream_until_stop(["x ab y cd"], ["cd", "ab"])) == "x "


def test_of_stop_strings_that_end_together_the_longest_wins():
    assert find_stop("12345", ["45", "345"]) == 2


def test_stop_string_whose_beginning_repeats_is_found():
    assert "".join(stream_until_stop(["aa", "ab", "!"], ["aab"])) == "a"


def test_without_stop_strings_text_passes_unchanged():
    assert list(stream_until_stop(["a", "", "b"], [])) == ["a", "", "b"]


def test_shown_text_does_not_depend_on_how_it_is_cut():
    rng = random.Random(7)
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randint(0, 14)))
        stops = [
            "".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))
        ]
        whole = "".join(stream_until_stop(list(text), stops))
        assert "".join(stream_until_stop(cut(text, rng), stops)) == whole
        assert not any(stop in whole for stop in stops)
        assert text.startswith(whole)

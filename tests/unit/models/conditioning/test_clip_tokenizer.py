"""open_clip's tokens, in bounded time."""

import html
import random
import string
import time

import open_clip
import pytest
import torch
from ftfy.badness import badness
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from models.conditioning.captions import CHARACTERS_A_TOKEN, bounded
from models.conditioning.clip_tokenizer import LONGEST_WORD, MOST_BAD, WORDS_KEPT, ClipTokenizer

TOKENS = 77
THEIRS = open_clip.SimpleTokenizer(context_length=TOKENS)
OURS = ClipTokenizer(TOKENS)


def letters(count: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(random.Random(0).choices(alphabet, k=count))


@given(st.text(max_size=LONGEST_WORD))
@example("aaaaaaa aaaa abababab banana mississippi")
@example("it's they'LL <start_of_text> x<END_OF_TEXT>y")
@example("&amp;lt; ﬁne “quoted” 猫が座る 👩\u200d🚒 \x00\x1b")
@settings(max_examples=500, deadline=None)
def test_a_caption_has_open_clips_tokens(caption: str) -> None:
    assume(badness(html.unescape(caption)) <= MOST_BAD)  # ftfy would mend more for too long
    assert torch.equal(OURS([caption]), THEIRS([caption]))


@given(st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=30), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_words_of_any_letters_have_open_clips_tokens(words: list[str]) -> None:
    caption = " ".join(words)[: TOKENS * CHARACTERS_A_TOKEN]
    assert torch.equal(OURS([caption, ""]), THEIRS([caption, ""]))


@given(st.text(st.characters(categories=None)), st.integers(0, 5000))
@settings(max_examples=200, deadline=None)
def test_any_text_of_any_length_gives_tokens(text: str, times: int) -> None:
    (ids,) = OURS([text * times])
    assert ids.shape == (TOKENS,)
    assert (ids == OURS.encoder["<end_of_text>"]).any()


@pytest.mark.parametrize(
    "caption",
    [
        letters(2**20),
        letters(2**20, string.ascii_lowercase + " "),
        "Ã©â‚¬ " * 2**17,
        "&amp;" * 2**18,
        " " * 2**20,
        "\n" * 2**20 + "cat",
        "\n".join("abc") * 2**10,
        "Ã©â‚¬ aaaa " * 2**15,
        letters(2**18, "猫犬鳥魚"),
        "'" * 2**20,
        "\x1b[31m" * 2**18,
    ],
    ids=[
        "word",
        "words",
        "mojibake",
        "entities",
        "spaces",
        "lines",
        "short lines",
        "mojibake and words",
        "chinese",
        "quotes",
        "escapes",
    ],
)
def test_a_megabyte_takes_hardly_longer_than_a_page(caption: str) -> None:
    """About a millisecond; the page is as long as what is read of any caption."""

    def seconds(text: str) -> float:
        OURS._word_ids.cache_clear()
        start = time.thread_time()
        OURS([text])
        return time.thread_time() - start

    page = caption[: 2**13]
    OURS(["a cat"])
    times = [(seconds(caption), seconds(page)) for _ in range(20)]
    whole, part = (min(found) for found in zip(*times, strict=True))
    assert whole < 3 * part


def test_long_words_of_a_data_set_do_not_fill_the_memory() -> None:
    assert OURS._word_ids.cache_info().maxsize == WORDS_KEPT


def test_a_bounded_caption_is_sound_and_the_same_where_it_is_short() -> None:
    assert bounded("a\n cat ", 2) == "a\n cat "
    assert bounded("bad \ud800 \udcff", 8) == "bad \ufffd \ufffd"
    assert bounded("a" + " " * 100 + "b" * 100, 2) == "a " + "b" * 14

"""Several captions a sample, of which every visit takes one."""

import json
import math
from collections import Counter
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import CaptionForm, DataConfig
from data.shards.captions import CaptionRule, choose_caption, texts_of
from data.shards.codecs import REPLACED_BYTES, BadSampleError
from data.streams.images import ImageStream
from data.streams.latents import LatentStream
from data.streams.stream import Randomness, Stream
from tests.support.data_sets import DataSet
from tests.support.streams import images, latents, take

WORDS = st.text("ab c", min_size=1).filter(str.strip)
FORMS = [CaptionForm.lines, CaptionForm.json]
Open = Callable[..., Stream]


def written(captions: list[str], form: CaptionForm) -> dict[str, bytes]:
    """A sample's members that hold these captions."""
    listed = json.dumps({"captions": captions, "seed": 1}).encode()
    lines = "\n\n".join(captions).encode()
    return {"json": listed} if form is CaptionForm.json else {"txt": lines}


@given(
    st.lists(WORDS, min_size=1, max_size=9),
    st.floats(1e-9, 1 - 1e-9),
    st.sampled_from(FORMS),
    st.data(),
)
def test_a_draw_takes_the_caption_in_whose_share_it_falls(
    captions: list[str], within: float, form: CaptionForm, data: st.DataObject
) -> None:
    members = written(captions, form)
    place = data.draw(st.integers(0, len(captions) - 1))
    # a draw on the edge of two shares may fall to either: their sums are rounded
    draw = (place + within) / len(captions)
    assert choose_caption(members.get, CaptionRule(form), draw) == captions[place].strip()
    assert choose_caption(members.get, CaptionRule(form)) == captions[0].strip()


def test_the_whole_text_is_one_caption_unless_told_otherwise() -> None:
    members = {"txt": b"two\nlines ", "json": b'{"captions": ["x"]}'}
    assert choose_caption(members.get, CaptionRule(), 0.9) == "two\nlines"
    assert choose_caption({"cls": b"7"}.get, CaptionRule(CaptionForm.lines), 0.9) == "7"
    assert choose_caption({"txt": b""}.get, CaptionRule(CaptionForm.lines), 0.9) == ""


NAMED = {"list": ["a cat", " a feline "], "nested": {"en": "a cat", "de": ["Katze", None]}}


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a cat ", ["a cat"]),
        (NAMED["list"], ["a cat", "a feline"]),
        (NAMED["nested"], ["a cat", "Katze"]),
        (7, ["7"]),
        (3.0, ["3"]),
        (2.5, ["2.5"]),
        (Decimal("4.00"), ["4"]),
        (b"caf\xc3\xa9", ["café"]),
        ("café".encode("utf-16"), ["café"]),
        ([("en", "a cat"), ("de", "Katze")], ["a cat", "Katze"]),
        (None, []),
        (math.nan, []),
        ("  ", []),
        ([], []),
    ],
)
def test_captions_are_taken_from_values_of_any_type(value: object, texts: list[str]) -> None:
    assert texts_of(value) == texts


@pytest.mark.parametrize("value", [False, True, ["a", False], {"en": True}, date(2024, 1, 1)])
def test_what_is_no_text_is_named_and_never_spelled_out(value: object) -> None:
    with pytest.raises(BadSampleError, match=r"caption is (true|false|date), not a text"):
        texts_of(value)


@settings(max_examples=500)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.just("captions") | st.text(), inner),
    )
)
def test_any_json_has_captions_or_makes_a_bad_sample(value: Any) -> None:
    listed = value.get("captions") if isinstance(value, dict) else None
    member = {"json": json.dumps(value).encode()}.get
    try:
        caption = choose_caption(member, CaptionRule(CaptionForm.json))
    except BadSampleError:
        return
    assert caption and caption == caption.strip()
    assert caption not in ("None", "True", "False") or caption in json.dumps(listed)


def test_fields_are_drawn_by_weight_and_those_that_are_missing_passed_over() -> None:
    rule = CaptionRule(CaptionForm.json, (("text.long", 3.0), ("short", 1.0)))
    document: dict[str, Any] = {"text": {"long": "a long one"}, "short": ["s", "t"]}
    drawn = Counter(
        choose_caption({"json": json.dumps(document).encode()}.get, rule, draw)
        for draw in np.arange(800) / 800
    )
    assert drawn == {"a long one": 600, "s": 100, "t": 100}
    del document["text"]
    member = {"json": json.dumps(document).encode()}.get
    assert choose_caption(member, rule, 0.49) == "s"
    with pytest.raises(BadSampleError, match=r"no text in field text\.long or short of its JSON"):
        choose_caption({"json": b"{}"}.get, rule)


@pytest.mark.parametrize("form", CaptionForm)
def test_a_model_without_conditions_needs_no_caption(form: CaptionForm) -> None:
    assert choose_caption({}.get, CaptionRule(form, required=False), 0.9) == ""
    with pytest.raises(BadSampleError, match=r"no caption|no text"):
        choose_caption({}.get, CaptionRule(form), 0.9)


@pytest.mark.parametrize(
    ("payload", "encoding", "caption", "remarks"),
    [
        ("naïve café".encode(), "utf-8", "naïve café", 0),
        ("naïve café".encode("utf-8-sig"), "utf-8", "naïve café", 0),
        ("naïve café".encode("utf-16"), "utf-8", "naïve café", 0),
        ("naïve café".encode("utf-32"), "cp1252", "naïve café", 0),
        ("naïve café".encode("cp1252"), "cp1252", "naïve café", 0),
        ("猫の絵".encode("shift_jis"), "shift_jis", "猫の絵", 0),
        ("naïve café".encode("cp1252"), "utf-8", "na\ufffdve caf\ufffd", 1),
    ],
)
def test_text_of_any_encoding_is_read_and_what_was_replaced_is_counted(
    payload: bytes, encoding: str, caption: str, remarks: int
) -> None:
    noted: Counter[str] = Counter()
    rule = CaptionRule(encoding=encoding)
    assert choose_caption({"txt": payload}.get, rule, noted=noted) == caption
    assert noted[REPLACED_BYTES] == remarks


def draws(epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Which caption: another in each epoch, by sample."""
    return (epochs + samples) % 3 / 3 + 0.1


@pytest.fixture(params=[ImageStream, LatentStream])
def opened(
    request: pytest.FixtureRequest, image_set: DataSet, latent_set: DataSet
) -> Callable[[CaptionForm], tuple[DataConfig, Open]]:
    """A set whose sample i has the captions i.0, i.1 and i.2."""
    make, open_set = {
        ImageStream: (image_set, images),
        LatentStream: (latent_set, latents),
    }[request.param]

    def build(form: CaptionForm) -> tuple[DataConfig, Open]:
        def more(number: int) -> dict[str, bytes]:
            return written([f"{number}.{which}" for which in range(3)], form)

        return make(more=more, captions=form), open_set

    return build


@pytest.mark.parametrize("form", FORMS)
def test_every_visit_takes_the_caption_drawn_for_it_on_any_number_of_ranks(
    opened: Callable[[CaptionForm], tuple[DataConfig, Open]], form: CaptionForm
) -> None:
    config, open_set = opened(form)
    drawn = Randomness(caption=draws)
    whole = take(open_set(config, drawn), 9)
    parts = [take(open_set(config, drawn, rank=rank, world=2), 9) for rank in range(2)]
    seen: Counter[str] = Counter()
    for step, batch in enumerate(whole):
        chosen = ((batch.epoch + batch.index) % 3).tolist()
        expected = [f"{n}.{which}" for n, which in zip(batch.index, chosen, strict=True)]
        assert batch.captions == expected
        assert [text for part in parts for text in part[step].captions] == expected
        seen.update(expected)
    assert len(seen) > 20  # some samples under several names
    resumed = take(open_set(config, drawn), 4, start=5)
    assert [batch.captions for batch in resumed] == [batch.captions for batch in whole[5:]]


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_drawn_the_first_caption_counts(
    opened: Callable[[CaptionForm], tuple[DataConfig, Open]], form: CaptionForm
) -> None:
    config, open_set = opened(form)
    stream, chosen = open_set(config), np.array([3, 17])
    assert stream.read(chosen).captions == stream.captions(chosen) == ["3.0", "17.0"]
    (batch,) = take(stream, 1)
    assert batch.captions == [f"{n}.0" for n in batch.index]


def test_a_sample_without_a_list_is_replaced_and_named(latent_set: DataSet) -> None:
    config = latent_set(
        more=lambda n: {"json": b"{}" if n == 4 else b'{"captions": ["x"]}'},
        captions=CaptionForm.json,
        max_rejected_share=0.1,
    )
    stream = latents(config)
    assert all(batch.captions == ["x"] * len(batch.keys) for batch in take(stream, 6))
    (rejected,) = stream.quarantine.rejected
    assert rejected.key == "000000004"
    assert rejected.reason == "no text in field captions of its JSON"

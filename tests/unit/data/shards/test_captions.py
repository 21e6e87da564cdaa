"""Several captions a sample, of which every visit takes one."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import CaptionForm, DataConfig
from data.shards.captions import choose_caption
from data.shards.codecs import BadSampleError
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
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(FORMS),
)
def test_a_draw_takes_the_caption_in_whose_share_it_falls(
    captions: list[str], draw: float, form: CaptionForm
) -> None:
    members = written(captions, form)
    place = next(n for n in range(len(captions)) if draw < (n + 1) / len(captions))
    assert choose_caption(members.get, form, draw) == captions[place].strip()
    assert choose_caption(members.get, form) == captions[0].strip()


def test_the_whole_text_is_one_caption_unless_told_otherwise() -> None:
    members = {"txt": b"two\nlines ", "json": b'{"captions": ["x"]}'}
    assert choose_caption(members.get, CaptionForm.text, 0.9) == "two\nlines"
    assert choose_caption({"cls": b"7"}.get, CaptionForm.lines, 0.9) == "7"
    assert choose_caption({"txt": b""}.get, CaptionForm.lines, 0.9) == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.just("captions") | st.text(), inner),
    )
)
def test_any_json_has_a_list_of_captions_or_makes_a_bad_sample(value: Any) -> None:
    listed = value.get("captions") if isinstance(value, dict) else None
    member = {"json": json.dumps(value).encode()}.get
    if isinstance(listed, list) and listed and all(isinstance(x, str) for x in listed):
        assert choose_caption(member, CaptionForm.json, 0.0) == listed[0].strip()
    else:
        with pytest.raises(BadSampleError, match="no list of captions in its JSON"):
            choose_caption(member, CaptionForm.json, 0.0)


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
    assert (rejected.key, rejected.reason) == ("000000004", "no list of captions in its JSON")

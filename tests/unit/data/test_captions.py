"""Several captions a sample, of which every visit takes one."""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.captions import choose_caption
from data.codecs import BadSampleError
from data.config import CaptionForm, DataConfig
from data.image_stream import ImageStream
from data.latent_stream import LatentStream
from data.stream import Stream
from tests.unit.data.test_stream import images, latents, take

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
def test_a_draw_takes_the_caption_in_whose_share_it_falls(captions, draw, form):
    members = written(captions, form)
    place = next(n for n in range(len(captions)) if draw < (n + 1) / len(captions))
    assert choose_caption(members.get, form, draw) == captions[place].strip()
    assert choose_caption(members.get, form) == captions[0].strip()


def test_the_whole_text_is_one_caption_unless_told_otherwise():
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
def test_any_json_has_a_list_of_captions_or_makes_a_bad_sample(value):
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
def opened(request, image_set, latent_set) -> Callable[[CaptionForm], tuple[DataConfig, Open]]:
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
def test_every_visit_takes_the_caption_drawn_for_it_on_any_number_of_ranks(opened, form):
    config, open_set = opened(form)
    whole = take(open_set(config, draws=draws), 9)
    parts = [take(open_set(config, draws=draws, rank=rank, world=2), 9) for rank in range(2)]
    seen: Counter[str] = Counter()
    for step, batch in enumerate(whole):
        chosen = ((batch.epoch + batch.index) % 3).tolist()
        expected = [f"{n}.{which}" for n, which in zip(batch.index, chosen, strict=True)]
        assert batch.captions == expected
        assert [text for part in parts for text in part[step].captions] == expected
        seen.update(expected)
    assert len(seen) > 20  # some samples under several names
    resumed = take(open_set(config, draws=draws), 4, start=5)
    assert [batch.captions for batch in resumed] == [batch.captions for batch in whole[5:]]


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_drawn_the_first_caption_counts(opened, form):
    config, open_set = opened(form)
    stream, chosen = open_set(config), np.array([3, 17])
    assert stream.read(chosen).captions == stream.captions(chosen) == ["3.0", "17.0"]
    (batch,) = take(stream, 1)
    assert batch.captions == [f"{n}.0" for n in batch.index]


def test_a_sample_without_a_list_is_replaced_and_named(latent_set):
    config = latent_set(
        more=lambda n: {"json": b"{}" if n == 4 else b'{"captions": ["x"]}'},
        captions=CaptionForm.json,
        max_rejected_share=0.1,
    )
    stream = latents(config)
    assert all(batch.captions == ["x"] * len(batch.keys) for batch in take(stream, 6))
    (rejected,) = stream.quarantine.rejected
    assert (rejected.key, rejected.reason) == ("000000004", "no list of captions in its JSON")

"""Grids that are taken apart again by their own word."""

import io

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.pictures.grids import about_grid, about_picture, places
from trainer.pictures.png import encode_png, grid


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(max_size=9), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_each_image_lies_where_its_grid_says(
    prompts: list[str], columns: int, height: int, width: int
) -> None:
    images = torch.arange(len(prompts), dtype=torch.uint8)[:, None, None, None]
    images = images.expand(-1, 3, height, width)
    content = encode_png(grid(images, columns), about_grid(prompts, columns))
    picture = Image.open(io.BytesIO(content))
    found = places(picture.size, about_picture(content))
    assert len(found) == len(prompts)
    for number, place in enumerate(found):
        cut = np.asarray(picture.crop(place.box))
        assert cut.shape == (height, width, 3) and (cut == number).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), st.lists, max_leaves=8
)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON, st.integers(1, 99), st.integers(1, 99))
def test_a_strangers_words_give_images_inside_the_picture(
    prompts: object, columns: object, width: int, height: int
) -> None:
    for place in places((width, height), {"prompts": prompts, "columns": columns}):
        left, top, right, bottom = place.box
        assert 1 <= left < right <= width and 1 <= top < bottom <= height

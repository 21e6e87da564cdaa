"""Tokens of a transformer that is trained with the U-Net: of boxes, and of captions."""

import numpy as np
import pytest
import torch
from hypothesis import given as tried
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given, LabelledBox
from models.conditioning.layout import GRID, LENGTH, MOST_BOXES, PADDING, corner_number
from models.conditioning.semantic_map import label_colours
from models.conditioning.token_transformer import HEADS, TokenLayer, TokenTransformer
from models.config import ConditionerConfig, ConditionerKind
from models.layers.attention import reference_attention

CLASSES = ["turtle", "red heart", "whale"]
CORNERS = (corner_number(0, 0), corner_number(1, 1))
PARTS = st.floats(0, 1)


def layout_of() -> Conditioner:
    torch.manual_seed(0)
    config = ConditionerConfig(kind=ConditionerKind.layout, classes=CLASSES, width=16, layers=2)
    return build_conditioner(config)


def numbers_of(*boxes: LabelledBox) -> list[int]:
    (numbers,) = layout_of().prepare(Given([""], boxes=[boxes]), (1, 1))["numbers"]
    return numbers.tolist()


def tokens_of(condition: Condition) -> torch.Tensor:
    assert condition.tokens is not None
    assert condition.planes is None
    return condition.tokens


def test_has_the_parameters_of_the_authors_transformers() -> None:
    """Theirs project to logits, too."""
    for vocabulary, length, width, layers, theirs in (
        (30_522, 77, 1280, 32, 581_994_042),  # LDM-KL-8 for text
        (8192, 92, 512, 16, 58_858_496),  # LDM-4 for layouts
    ):
        with torch.device("meta"):
            transformer = TokenTransformer(vocabulary, length, width, layers)
        logits = vocabulary * (width + 1)
        assert sum(one.numel() for one in transformer.parameters()) == theirs - logits


def test_a_layer_is_that_of_the_equations() -> None:
    torch.manual_seed(0)
    layer, x = TokenLayer(24), torch.randn(3 * 5, 24)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 4 + [True]])
    found = layer(x, mask, 3)
    rows = layer.norm1(x)
    q, k, v = (F.linear(rows, one.weight).view(3, 5, HEADS, 64) for one in (
        layer.to_q, layer.to_k, layer.to_v,
    ))  # fmt: skip
    mixed = reference_attention(q, k, v, mask).reshape(15, -1)
    after = x + F.linear(mixed, layer.to_out.weight, layer.to_out.bias)
    first, _, second = layer.feed_forward
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    inside = F.gelu(F.linear(layer.norm2(after), first.weight, first.bias))
    torch.testing.assert_close(found, after + F.linear(inside, second.weight, second.bias))


def test_padding_changes_no_other_token() -> None:
    torch.manual_seed(0)
    transformer = TokenTransformer(50, 8, 16, 3)
    numbers = torch.randint(50, (2, 8))
    mask = torch.tensor([[True, True, False, True, False, False, True, True], [True] * 8])
    other = torch.where(mask, numbers, 49 - numbers)
    found, changed = transformer(numbers, mask), transformer(other, mask)
    assert torch.equal(found[mask], changed[mask])
    assert not torch.equal(transformer(numbers), transformer(other))
    short = transformer(numbers[:, :5])
    ends = torch.arange(8) < 5
    torch.testing.assert_close(transformer(numbers, ends.expand(2, -1))[:, :5], short)


def test_places_and_numbers_tell_tokens_apart() -> None:
    transformer = TokenTransformer(9, 4, 16, 1)
    same = transformer(torch.full((1, 4), 3))
    assert len(same[0].unique(dim=0)) == 4
    assert not torch.equal(same, transformer(torch.full((1, 4), 4)))


@tried(PARTS, PARTS)
def test_corners_are_numbered_to_the_next_point_of_the_grid(x: float, y: float) -> None:
    number = corner_number(x, y)
    assert 0 <= number < GRID**2 <= PADDING
    row, column = divmod(number, GRID)
    half = 0.5 / (GRID - 1) + 1e-9
    assert abs(column / (GRID - 1) - x) <= half
    assert abs(row / (GRID - 1) - y) <= half
    assert corner_number(column / (GRID - 1), row / (GRID - 1)) == number


@tried(st.integers(0, GRID - 1), st.integers(0, GRID - 1))
def test_a_flip_moves_the_corners_of_a_box(column: int, row: int) -> None:
    """Of boxes on the grid; between its points the halves round away from each other."""
    left, top, last = column / (GRID - 1), row / (GRID - 1), GRID - 1
    number, first, second = numbers_of(("whale", left, top, 1.0, 1.0))[:3]
    mirrored = numbers_of(("whale", 0.0, top, 1.0 - left, 1.0))[:3]
    assert mirrored == [number, row * GRID, last * GRID + last - column]
    assert (number, first, second) == (2, row * GRID + column, GRID**2 - 1)


def test_boxes_come_by_size_and_the_smallest_are_left_out() -> None:
    small, large = ("turtle", 0.5, 0.5, 0.6, 0.6), ("whale", 0.0, 0.0, 1.0, 0.5)
    found = numbers_of(small, large)
    assert len(found) == LENGTH == 92
    assert found[0:6:3] == [2, 0]
    assert found[6:-2] == [PADDING] * (LENGTH - 8)
    assert tuple(found[-2:]) == CORNERS
    assert numbers_of(large, small) == found
    crowd = [("red heart", 0.0, 0.0, 0.2 + number / 100, 0.5) for number in range(MOST_BOXES)]
    full = numbers_of(("turtle", 0.0, 0.0, 0.1, 0.1), *crowd)
    assert full[0:-2:3] == [1] * MOST_BOXES
    assert tuple(full[-2:]) == CORNERS


def test_the_null_condition_has_the_corners_of_the_image_alone() -> None:
    conditioner, box = layout_of(), ("turtle", 0.1, 0.1, 0.9, 0.9)
    given = Given(["a turtle", None, "nothing"], boxes=[[box], [box], []])
    inputs = conditioner.prepare(given, (1, 1))
    assert inputs["mask"].sum(1).tolist() == [5, 2, 2]
    assert torch.equal(inputs["mask"][:, :-2], inputs["numbers"][:, :-2] != PADDING)
    condition = conditioner.condition(given, (4, 4))
    tokens = tokens_of(condition)
    assert tokens.shape == (3, LENGTH, 16)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[1], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    alone = conditioner.condition(Given([None]), (1, 1))  # as guidance without boxes
    torch.testing.assert_close(tokens_of(alone)[0], tokens[1])
    assert condition.mask is not None
    assert torch.equal(condition.mask, inputs["mask"])


def test_boxes_that_are_missing_or_unknown_are_named() -> None:
    conditioner = layout_of()
    with pytest.raises(ValueError, match=r"needs boxes: sample\.boxes, .* data\.boxes=true"):
        conditioner.prepare(Given([""]), (1, 1))
    box = ("zebra", 0.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"'zebra' .* not in conditioner\.classes"):
        conditioner.prepare(Given([""], boxes=[[box]]), (1, 1))


def test_classes_have_one_number_each() -> None:
    for classes, message in (
        (["whale", "turtle", "whale"], r"conditioner\.classes has 'whale' 2 times"),
        ([str(number) for number in range(8192)], r"conditioner\.classes has 8192 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            build_conditioner(ConditionerConfig(kind=ConditionerKind.layout, classes=classes))


def test_boxes_are_drawn_in_their_colours_with_labels_that_fit() -> None:
    conditioner = layout_of()
    boxes = [("whale", 0.0, 0.0, 0.5, 0.5), ("turtle", 0.75, 0.75, 1.0, 1.0)]
    (picture,) = conditioner.picture(Given([""], boxes=[boxes]), (1, 1))
    assert picture.shape == (3, 256, 256)
    whale, turtle = label_colours(torch.tensor([[[2, 0]]]))[0, :, 0].T
    torch.testing.assert_close(picture[:, 0, 5], whale, atol=0.01, rtol=0)
    torch.testing.assert_close(picture[:, 255, 200], turtle, atol=0.01, rtol=0)
    assert (picture[:, 140:180, 10:180] == 1).all()
    inside = picture[:, 3:20, 3:60]  # the label
    assert (inside < 1).any()
    narrow = [("red heart", 0.0, 0.0, 0.2, 1.0)]
    (picture,) = conditioner.picture(Given([""], boxes=[narrow]), (1, 1))
    assert (picture[:, 3:250, 3:48] == 1).all()
    small = conditioner.picture(Given([""], torch.zeros(1, 3, 32, 48), boxes=[boxes]), (1, 1))
    assert small.shape == (1, 3, 32, 48)
    assert (small[0, :, 3:14, 4:20] == 1).all()  # no label fits


def test_captions_are_encoded_with_their_own_transformer() -> None:
    torch.manual_seed(0)
    config = ConditionerConfig(
        kind=ConditionerKind.text_transformer, context_length=12, width=16, layers=2
    )
    conditioner = build_conditioner(config)
    assert conditioner.trainable
    captions = ["a turtle left of a red heart", None, "", "whale " * 99, "a red heart"]
    condition = conditioner.condition(Given(captions), (4, 4))
    tokens = tokens_of(condition)
    assert condition.mask is None
    assert (tokens.shape, tokens.dtype) == ((5, 12, 16), torch.float32)
    torch.testing.assert_close(tokens[1], tokens[2])
    distances = torch.cdist(tokens.flatten(1), tokens.flatten(1)).detach().numpy()
    apart = distances[np.ix_([0, 1, 3, 4], [0, 1, 3, 4])]
    assert (apart[~np.eye(4, dtype=bool)] > 0.1).all()
    tokens.square().sum().backward()
    assert all(one.grad is not None for one in conditioner.parameters())

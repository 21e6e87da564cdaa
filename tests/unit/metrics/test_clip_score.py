import itertools
from collections.abc import Callable

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.nn import functional as F

from trainer.metrics.clip_score import ClipScore

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PROMPTS = ["a red heart", "a cat", "flag of Peru", "clown face", "sun", "pizza", "a key"]


class Tables:
    """A contrastive model that looks vectors up: images and prompts hold their row's number."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts = images, texts

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        rows = image[:, 0, 0, 0].round().long()
        return F.normalize(self.images[rows], dim=-1) if normalize else self.images[rows]

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(self.texts[text], dim=-1) if normalize else self.texts[text]


def numbers(prompts: list[str]) -> Tensor:
    return torch.tensor([int(prompt or 0) for prompt in prompts])


def table_score(images: Tensor, texts: Tensor) -> ClipScore:
    return ClipScore(Tables(images, texts), numbers, 2, (0, 0, 0), (1 / 255,) * 3)


def update(score: ClipScore, rows: list[int]) -> None:
    images = torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    score.update(images, [str(row) for row in rows])


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 5), cut=st.integers(0, 5), seed=st.integers(0, 9999))
def test_scores_are_the_average_over_pairs_and_over_derangements(n: int, cut: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    texts = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    ranks = [table_score(images, texts), table_score(images, texts)]
    rows = torch.randperm(n, generator=generator).tolist()
    for rank, part in zip(ranks, (rows[:cut], rows[cut:]), strict=True):
        if part:
            update(rank, part)
    for name, total in ranks[0].state().items():
        total += ranks[1].state()[name]
    result = ranks[0].compute()

    cosines = F.cosine_similarity(images[:, None], texts[None], dim=2)
    matched = cosines.diag()
    derangements = [
        cosines[range(n), order].mean()
        for order in itertools.permutations(range(n))
        if all(i != j for i, j in enumerate(order))
    ]
    assert set(result) == {"clip_score", "clip_score_stderr", "clip_score_shuffled"}
    assert result["clip_score"] == pytest.approx(float(matched.mean()), abs=1e-9)
    assert result["clip_score_stderr"] == pytest.approx(float(matched.std() / n**0.5), abs=1e-6)
    assert result["clip_score_shuffled"] == pytest.approx(
        float(torch.stack(derangements).mean()), abs=1e-9
    )


@pytest.fixture(scope="module")
def clip() -> tuple[open_clip.CLIP, Callable[[list[str]], Tensor]]:
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=CLIPVisionCfg(image_size=32, patch_size=8, layers=2, width=64),
        text_cfg=CLIPTextCfg(context_length=16, width=32, heads=2, layers=2),
    )
    return model.eval(), open_clip.SimpleTokenizer(context_length=16)


def test_open_clip_scores_are_its_own_cosines(
    clip: tuple[open_clip.CLIP, Callable[[list[str]], Tensor]],
):
    model, tokenizer = clip
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        output = model(pixels, tokenizer(PROMPTS))
    cosines = output[0] @ output[1].T

    score = ClipScore(model, tokenizer, 32, MEAN, STD)
    score.update(images[:3], PROMPTS[:3])
    score.update(images[3:], PROMPTS[3:])
    result = score.compute()
    assert result["clip_score"] == pytest.approx(cosines.diag().mean().item(), abs=1e-5)
    mismatched = (cosines.sum() - cosines.trace()) / 42
    assert result["clip_score_shuffled"] == pytest.approx(mismatched.item(), abs=1e-5)


def test_images_of_any_size_are_resized(
    clip: tuple[open_clip.CLIP, Callable[[list[str]], Tensor]],
):
    scores = []
    for side in (32, 96):
        score = ClipScore(*clip, 32, MEAN, STD)
        colours = torch.arange(0, 250, 25, dtype=torch.uint8).view(-1, 1, 1, 1)
        score.update(colours.expand(-1, 3, side, side), [str(i) for i in range(10)])
        scores.append(score.compute())
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_too_few_samples_and_missing_prompts_are_refused():
    score = table_score(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="2 images cannot match 1 prompts"):
        score.update(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), ["0"])
    update(score, [1])
    with pytest.raises(ValueError, match="two samples"):
        score.compute()

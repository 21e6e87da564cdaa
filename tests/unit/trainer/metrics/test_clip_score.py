import itertools

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional as F

from models.conditioning.clip import Clip
from models.conditioning.clip_tokenizer import ClipTokenizer
from trainer.metrics.clip_features import ClipFeatures
from trainer.metrics.clip_score import ClipScore

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PROMPTS = ["a red heart", "a cat", "flag of Peru", "clown face", "sun", "pizza", "a key"]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 5), cut=st.integers(0, 5), seed=st.integers(0, 9999))
def test_scores_are_the_average_over_pairs_and_over_derangements(
    n: int, cut: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    texts = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    ranks = [ClipScore(4), ClipScore(4)]
    rows = torch.randperm(n, generator=generator).tolist()
    for rank, part in zip(ranks, (rows[:cut], rows[cut:]), strict=True):
        rank.update(images[part], texts[part])
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


def clip_of(image_size: int) -> Clip:
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=CLIPVisionCfg(image_size=image_size, patch_size=8, layers=2, width=64),
        text_cfg=CLIPTextCfg(context_length=16, width=32, heads=2, layers=2),
    )
    tokenizer = ClipTokenizer(context_length=16)
    return Clip(model.eval(), tokenizer, MEAN, STD, {}, 16)


def test_open_clip_scores_are_its_own_cosines() -> None:
    clip = clip_of(32)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        output = clip.model(pixels, clip.tokenizer(PROMPTS))
        texts = clip.model.encode_text(clip.tokenizer(PROMPTS))
    cosines = output[0] @ output[1].T

    features = ClipFeatures(clip)
    assert features(images).shape == (7, features.num_features) == (7, 16)
    score = ClipScore(features.num_features)
    score.update(features(images[:3]), texts[:3])
    score.update(features(images[3:]), texts[3:])
    result = score.compute()
    assert result["clip_score"] == pytest.approx(cosines.diag().mean().item(), abs=1e-5)
    mismatched = (cosines.sum() - cosines.trace()) / 42
    assert result["clip_score_shuffled"] == pytest.approx(mismatched.item(), abs=1e-5)


def test_images_of_any_size_are_resized() -> None:
    features = ClipFeatures(clip_of(32))
    colours = torch.arange(0, 250, 25, dtype=torch.uint8).view(-1, 1, 1, 1)
    small, large = (features(colours.expand(-1, 3, side, side)) for side in (32, 96))
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-4)
    assert (small[0] - small[9]).abs().max() > 0.1


def test_too_few_samples_and_missing_prompts_are_refused() -> None:
    score, embeddings = ClipScore(3), torch.eye(3)
    with pytest.raises(ValueError, match="2 images cannot match 1 prompts"):
        score.update(embeddings[:2], embeddings[:1])
    score.update(embeddings[:1], embeddings[:1])
    with pytest.raises(ValueError, match="two samples"):
        score.compute()

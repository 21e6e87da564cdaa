import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from models.first_stage import codebook as vq
from models.first_stage.codebook import (
    VectorQuantizer,
    code_counts,
    codebook_use,
    nearest_codes,
    spread_choice,
)


def drawn(seed: int, pixels: int, codes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents [pixels, width] and a codebook [codes, width]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(pixels, width, generator=generator)
    return z, torch.randn(codes, width, generator=generator)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
def test_nearest_codes_are_those_of_the_distances(
    pixels: int, codes: int, width: int, seed: int
) -> None:
    z, codebook = drawn(seed, pixels, codes, width)
    distances = torch.cdist(z.double(), codebook.double())
    found = distances.gather(1, nearest_codes(z, codebook)[:, None])[:, 0]
    torch.testing.assert_close(found, distances.amin(dim=1), rtol=1e-5, atol=1e-5)


def test_pixels_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(50, 3), torch.randn(20, 3)
    whole = nearest_codes(z, codebook)
    monkeypatch.setattr(vq, "CHUNK", 7)
    assert torch.equal(nearest_codes(z, codebook), whole)


def test_gradients_pass_straight_through_and_the_loss_pulls_both_ways() -> None:
    torch.manual_seed(0)
    quantize = VectorQuantizer(8, 3)
    latents = torch.randn(2, 3, 4, 5, requires_grad=True)
    found = quantize(latents)
    weight = quantize.embedding.weight
    nearest = weight[found.codes].movedim(-1, 1)
    torch.testing.assert_close(found.latents, nearest)
    probe = torch.randn_like(latents)
    (straight,) = torch.autograd.grad((found.latents * probe).sum(), latents, retain_graph=True)
    assert torch.equal(straight, probe)
    to_latents, to_codes = torch.autograd.grad(found.loss, (latents, weight))
    error = (latents - nearest).detach()
    torch.testing.assert_close(to_latents, 0.25 * 2 * error / error.numel())
    expected = torch.zeros_like(weight).index_add(
        0, found.codes.flatten(), -2 * error.movedim(1, -1).flatten(0, 2) / error.numel()
    )
    torch.testing.assert_close(to_codes, expected)


def test_a_moving_codebook_follows_the_sums_and_counts_of_the_paper() -> None:
    torch.manual_seed(0)
    decay, codes, width = 0.9, 6, 3
    quantize = VectorQuantizer(codes, width, decay=decay).train()
    assert not list(quantize.parameters())
    counts = torch.zeros(codes, dtype=torch.float64)
    expected = quantize.embedding.weight.double()
    sums = torch.zeros_like(expected)
    for _ in range(5):
        latents = torch.randn(2, width, 3, 3)
        chosen = quantize(latents).codes.flatten()
        pixels = latents.movedim(1, -1).reshape(-1, width).double()
        counts = decay * counts + (1 - decay) * code_counts(chosen, codes)
        sums = decay * sums + (1 - decay) * torch.zeros_like(sums).index_add(0, chosen, pixels)
        used = counts > 0
        expected[used] = sums[used] / counts[used, None]
        torch.testing.assert_close(quantize.embedding.weight.double(), expected, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.integers(0, 1000))
def test_pixels_are_chosen_as_often_as_the_codebook_serves_them_badly(
    pixels: int, codes: int, count: int, seed: int
) -> None:
    z, others = drawn(seed, pixels, codes, 3)
    codebook = torch.cat([z[:1], others])
    chosen = spread_choice(z, codebook, count)
    assert chosen.shape == (count, 3)
    errors = torch.cdist(z.double(), codebook.double()).amin(dim=1).square()
    if pixels == 1:
        return  # served perfectly: any choice is as good
    for pixel, share in zip(z, errors / errors.sum(), strict=True):
        times = (chosen == pixel).all(dim=1).sum().item()
        assert abs(times - count * share.item()) <= 1 + 1e-4 * count


def test_idle_codes_move_to_latents_and_the_others_stay() -> None:
    torch.manual_seed(0)
    plain, revived = (VectorQuantizer(8, 3, decay=0.9, revival=r) for r in (0.0, 0.5))
    revived.load_state_dict(plain.state_dict())
    latents = 5 + torch.randn(2, 3, 4, 4)  # far from all codes: few are chosen
    for network in (plain, revived):
        network(latents)
    idle = plain.counts < 0.5
    assert 0 < idle.sum() < 8
    assert torch.equal(plain.embedding.weight[~idle], revived.embedding.weight[~idle])
    pixels = latents.movedim(1, -1).reshape(-1, 3)
    moved = revived.embedding.weight[idle]
    assert (torch.cdist(moved, pixels).amin(dim=1) == 0).all()
    assert torch.equal(revived.counts[idle], torch.full((int(idle.sum()),), 32 / 8))
    assert torch.equal(plain.counts[~idle], revived.counts[~idle])
    revived(latents)
    codes = revived(latents).codes
    assert codebook_use(code_counts(codes, 8))["codebook_used_share"] > 0.7


def follow_on_a_rank(rank: int, rendezvous: str, latents: torch.Tensor, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    quantize = idle_quantizer()
    for step in latents:
        quantize(step.chunk(2)[rank])
    torch.save(quantize.state_dict(), f"{found}.{rank}")
    dist.destroy_process_group()


def idle_quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(16, 3, decay=0.9, revival=0.5)


def test_codes_move_and_revive_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    latents = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    alone = idle_quantizer()
    for step in latents:
        alone(step)
    arguments = (str(tmp_path / "rendezvous"), latents, str(tmp_path / "found"))
    spawn(follow_on_a_rank, arguments, nprocs=2)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"found.{rank}").items():
            torch.testing.assert_close(value, alone.state_dict()[name])


@pytest.mark.parametrize("still", ["evaluation", "no gradients"])
def test_a_moving_codebook_moves_in_training_alone(still: str) -> None:
    quantize = VectorQuantizer(6, 3, decay=0.9).train(still != "evaluation")
    before = quantize.embedding.weight.clone()
    with torch.set_grad_enabled(still != "no gradients"):
        quantize(torch.randn(2, 3, 4, 4))
    assert torch.equal(quantize.embedding.weight, before)


def test_use_of_a_codebook() -> None:
    assert codebook_use(code_counts(torch.tensor([[0, 1], [2, 3]]), 8)) == pytest.approx(
        {"codebook_used_share": 0.5, "codebook_perplexity": 4.0}
    )
    uneven = codebook_use(code_counts(torch.tensor([0, 0, 0, 1]), 2))
    assert uneven["codebook_used_share"] == 1.0
    assert math.log(uneven["codebook_perplexity"]) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )

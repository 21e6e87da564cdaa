"""Training on captions that an encoder pads, and on several captions a sample."""

import json
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Never

import pytest
import torch
from torch import Tensor, nn

from data.config import CaptionForm
from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.conditioners import build_conditioner
from models.conditioning.text import Text
from tests.support.text_encoders import WORDS, bert, write_tokenizer
from tests.support.workshop import Workshop, draw_pictures, losses
from trainer import pipeline
from trainer.config import Config
from trainer.pack.job import pack
from trainer.precompute.job import precompute
from trainer.runtime.ranks import ALONE, Ranks
from trainer.streams import open_latents
from trainer.train import denoiser
from trainer.train.denoiser import build_denoising
from trainer.train.loop import fit

COLOURS = {"b": "green", "c": "blue", "d": "circle"}


class Listener(nn.Module):
    """Stands in for the network: keeps what it is conditioned on, answers zero."""

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.condition = condition
        return torch.zeros_like(latents)


@pytest.fixture(scope="module")
def options(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small random BERT that knows some of the words, and latents that keep its tokens."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    bert().save_pretrained(folder / "encoder")
    write_tokenizer(folder / "encoder", [COLOURS.get(word, word) for word in WORDS])
    chosen = [
        "conditioner.kind=transformers",
        f"conditioner.pretrained={folder / 'encoder'}",
        "conditioner.width=32",
        "conditioner.context_length=8",
        "unet.context_dim=32",
        f"data.latents={folder / 'latents'}",
    ]
    precompute(workshop.config("emoji", *chosen, "data.store_text=true"))
    return chosen


def first_condition(workshop: Workshop, *options: str) -> Condition:
    config = workshop.config("emoji", *options, "conditioner.cond_drop_prob=0.5")
    task, listener = build_denoising(config, ALONE), Listener()
    with closing(task.stream.steps(0)) as batches:
        task.turns(0)[0].loss(listener, next(batches)[0])
    return listener.condition


def test_stored_and_computed_conditions_are_the_same(
    workshop: Workshop, options: list[str]
) -> None:
    whole = ["train.global_batch_size=32", "train.micro_batch_size=32"]
    computed = first_condition(workshop, *options, *whole)
    stored = first_condition(workshop, *options, *whole, "data.store_text=true")
    torch.testing.assert_close(stored.tokens, computed.tokens, rtol=2e-3, atol=2e-3)
    assert computed.mask is not None
    assert stored.mask is not None
    assert torch.equal(stored.mask, computed.mask)
    assert set(computed.mask.sum(1).tolist()) == {2, 5}  # nothing, or three words


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("data.store_text=false", ("meta", torch.bfloat16)),
        ("data.store_text=true", ("cpu", torch.float32)),
    ],
)
def test_the_text_encoder_is_where_and_in_the_precision_that_training_needs(
    workshop: Workshop,
    options: list[str],
    more: str,
    expected: tuple[str, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands in for a GPU: it is enough to build on."""
    built: list[Conditioner] = []

    def choose(config: Config, conditioner: Conditioner, device: torch.device) -> Never:
        built.append(conditioner)
        raise InterruptedError

    monkeypatch.setattr(pipeline, "inference_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(denoiser, "_choose_attention", choose)
    config = workshop.config("emoji", *options, more, "train.precision=bf16")
    with pytest.raises(InterruptedError):
        build_denoising(config, Ranks(0, 1, torch.device("meta")))
    found = {(one.device.type, one.dtype) for one in built[0].parameters()}
    assert found == {expected}


@pytest.mark.parametrize("more", ["data.store_text=false", "data.store_text=true"])
def test_a_run_goes_on_with_its_text_encoder_in_another_precision(
    workshop: Workshop, options: list[str], more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.config("emoji", *options, more, "train.precision=bf16")
    saved = build_denoising(config, ALONE).state()
    monkeypatch.setattr(pipeline, "inference_dtype", lambda *_: torch.bfloat16)
    task = build_denoising(config, ALONE)
    task.load(saved)
    suffix = ":bfloat16" if "false" in more else ""
    assert task.state()["text_encoder"] == saved["text_encoder"] + suffix
    saved["text_encoder"] = "f" + saved["text_encoder"]
    with pytest.raises(ValueError, match=r"^conditioner\.pretrained: the weights of this run"):
        task.load(saved)


def test_a_checkpoint_names_the_kernels_of_attention(workshop: Workshop, tmp_path: Path) -> None:
    assert fit(workshop.config("emoji", "train.max_steps=1", run=tmp_path)) == 0
    (file,) = tmp_path.glob("checkpoints/*/state.json")
    kernels = json.loads(file.read_text())["task"]["kernels"]
    assert kernels == {"attention of float32 heads of 16": "SDPA flash"}
    assert json.loads((tmp_path / "versions.json").read_text()).items() >= kernels.items()


def test_a_run_does_not_depend_on_the_padding(
    workshop: Workshop, options: list[str], tmp_path: Path
) -> None:
    """The mask survives ZeRO 3 and the recomputation of activations."""
    longer = ["conditioner.context_length=16", "deepspeed.stage=3"]
    runs = {"short": [], "long": [*longer, "unet.gradient_checkpointing=true"]}
    found = []
    for name, more in runs.items():
        steps = [*options, "train.max_steps=6", "eval.every=6", "optim.lr=0.02", *more]
        assert fit(workshop.config("emoji", *steps, run=tmp_path / name)) == 0
        assert list((tmp_path / name / "samples").glob("*.png"))
        found.append(losses(tmp_path / name))
    short, long = found
    assert sorted(short) == [1, 2, 3, 4, 5, 6]
    assert max(abs(short[step] - long[step]) for step in short) < 1e-5


def test_visits_take_other_captions_whatever_the_ranks(workshop: Workshop, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", captions=["one\ntwo\nthree"] * 24)
    shutil.copy(workshop.folder / "first_stage_4.safetensors", tmp_path)
    shop = Workshop(tmp_path)
    config = shop.config("emoji", "data.captions=lines", "data.source.val_share=0")
    pack(config)
    precompute(config)

    def captions(rank: int, ranks: int, *, start: int = 0) -> list[list[str]]:
        stream = open_latents(config, Ranks(rank, ranks, torch.device("cpu")))
        with closing(stream.steps(start)) as steps:
            return [
                [c for part in step for c in part.captions] for step in islice(steps, 9 - start)
            ]

    whole = captions(0, 1)
    halves = zip(captions(0, 2), captions(1, 2), strict=True)
    assert [first + second for first, second in halves] == whole
    assert captions(0, 1, start=5) == whole[5:]
    counts = Counter(caption for step in whole for caption in step)
    assert set(counts) == {"one", "two", "three"}
    assert min(counts.values()) > 12  # of 72 visits


@pytest.mark.parametrize("form", ["lines", "json"])
def test_the_stored_text_is_that_of_the_caption_that_is_drawn(
    workshop: Workshop, tmp_path: Path, form: str
) -> None:
    names = [f"{color} {thing}" for color in ("red", "blue") for thing in ("one", "two")]
    texts = ["\n".join(names[: 1 + number % 4]) for number in range(24)]
    draw_pictures(tmp_path / "pictures", captions=texts)
    if form == "json":
        lines = [
            json.dumps({"file_name": f"{n:03d}.png", "text": names[: 1 + n % 4]}) for n in range(24)
        ]
        (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    shutil.copy(workshop.folder / "first_stage_4.safetensors", tmp_path)
    options = [f"data.captions={form}", "data.store_text=true", "data.source.val_share=0"]
    config = Workshop(tmp_path).config("emoji", *options)
    pack(config)
    precompute(config)
    text = build_conditioner(config.conditioner)
    assert isinstance(text, Text)
    stream = open_latents(config, Ranks(0, 1, torch.device("cpu")))
    seen: set[str] = set()
    with closing(stream.steps(0)) as steps:
        for step in islice(steps, 9):
            for part in step:
                with torch.no_grad():
                    expected = text.encode(part.captions)
                torch.testing.assert_close(
                    part.arrays["text"].float(), expected, rtol=2e-3, atol=2e-3
                )
                seen.update(part.captions)
    assert seen == set(names)
    other = {"lines": "json", "json": "lines"}[form]
    with pytest.raises(ValueError, match=rf"^data\.captions: .* text of {form}"):
        changed = replace(config, data=replace(config.data, captions=CaptionForm(other)))
        open_latents(changed, Ranks(0, 1, torch.device("cpu")))

"""The tables of metrics and features: complete, and open to more."""

import json
from pathlib import Path

import pytest

from models.config.targets import resolve
from tests.support.enums import add_member
from tests.support.small_metric import add_mean_colour
from tests.support.workshop import Workshop, draw_pictures
from trainer.cli import load_config
from trainer.config.choices import Features, Metric
from trainer.config.metrics import (
    FEATURES,
    METRICS,
    MetricEntry,
    Number,
    find_number,
    logged_name,
    title_and_unit,
)
from trainer.evaluate.job import evaluate
from trainer.pack.job import pack
from trainer.report.job import report


def test_every_choice_has_an_entry_whose_function_exists() -> None:
    assert list(METRICS) == list(Metric)
    assert list(FEATURES) == list(Features)
    targets = [entry.compute for entry in METRICS.values()]
    targets += [entry.build for entry in FEATURES.values()]
    assert all(callable(resolve(target)) for target in targets)


@pytest.mark.parametrize(
    ("metric", "name", "logged"),
    [
        (Metric.frechet, "fd", "fd_dinov2"),
        (Metric.kid, "kid_std", "kid_dinov2_std"),
        (Metric.inception_score, "inception_score_std", "inception_score_std"),
        (Metric.cmmd, "cmmd", "cmmd"),
    ],
)
def test_numbers_are_logged_with_their_features_unless_only_one_network_has_them(
    metric: Metric, name: str, logged: str
) -> None:
    assert logged_name(metric, name, Features.dinov2) == logged


@pytest.mark.parametrize(
    ("name", "title", "unit", "rises"),
    [
        ("fd_inception", "FID (Inception)", "", False),
        ("fd_open_clip", "Fréchet distance (CLIP)", "", False),
        ("kid_dinov2", "KID (DINOv2)", "", False),
        ("recall_efficientnet_lite0", "Recall (EfficientNet-Lite0)", "", True),
        ("inception_score", "Inception score", "", True),
        ("cmmd", "CMMD", "", False),
        ("clip_score", "CLIP score", "", True),
        ("psnr_db", "PSNR of reconstructions", "dB", True),
        ("ssim", "SSIM of reconstructions", "", True),
        ("rfd_inception", "Fréchet distance of reconstructions (Inception)", "", False),
        ("somebody_elses", "somebody_elses", "", False),
    ],
)
def test_the_report_knows_what_people_call_a_number_and_which_is_better(
    name: str, title: str, unit: str, rises: bool
) -> None:
    found = find_number(name)
    assert (found.title, found.unit, found.higher_is_better) == (title, unit, rises)


def test_a_metric_and_features_added_to_the_tables_are_checked_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = add_member(monkeypatch, Metric, "agreement")
    entry = MetricEntry(
        compute="tests.support.small_metric:compute",
        numbers={"agreement": Number(title="Agreement", unit="parts", higher_is_better=True)},
        needs_rows=False,
        least_samples=7,
    )
    monkeypatch.setitem(METRICS, metric, entry)
    add_mean_colour(monkeypatch)

    options = ["eval.metrics=[frechet,agreement]", "eval.features=[mean_colour]"]
    with pytest.raises(ValueError, match=r"eval\.num_samples=6: agreement needs 7 or more"):
        load_config(["+experiment=emoji", "eval.num_samples=6", *options])

    shop = Workshop(tmp_path)
    draw_pictures(tmp_path / "pictures")
    pack(shop.config("emoji"))
    run = tmp_path / "run"
    images = f"eval.images={tmp_path / 'pictures'}"
    evaluate(shop.config("emoji", *options, "eval.num_samples=7", images, run=run))
    (file,) = (run / "evaluations").glob("images_pictures_*.json")
    values = json.loads(file.read_text())
    assert 0.9 < values["agreement_mean_colour"] < 1
    assert 0 < values["fd_mean_colour"] < 1
    assert len(list((tmp_path / "data" / "references").glob("mean_colour-*.json"))) == 1

    values = {1: 0.25, 2: 0.75, 3: 0.5}
    lines = [{"step": step, "eval/agreement_mean_colour": v} for step, v in values.items()]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Agreement (mean colour)" in page
    assert "best 0.75" in page


def test_headings_of_columns_have_names_and_units() -> None:
    assert title_and_unit("psnr_db") == "PSNR of reconstructions [dB]"
    assert title_and_unit("clip_score_shuffled") == "CLIP score of other prompts"

"""The judge's own pieces: what it measures on pictures whose answer is known, on toy stickers and tiny random weights."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from retouch.boxes import bounds
from retouch.edit import InvalidOption
from retouch.engine import Engine
from retouch.train import figures, judge
from retouch.train.cases import KINDS, cases, hue_shares, main_hue, surround_mean
from retouch.train.classifier import Classifier, _pixels, renders, tile, train_classifier
from retouch.train.concepts import CODEPOINTS, COLOURABLE, HELD_OUT, HUES, SEEN, hue_name
from retouch.train.data import Source

CPU = torch.device("cpu")


class Toys(Source):
    """Each concept is a disc of its own colour and size of hole; no package is fetched."""

    def __init__(self):
        self.concepts = tuple(CODEPOINTS)
        self.photos = [tiny.photo(96, 112, seed) for seed in range(2)]
        y, x = np.mgrid[-32:32, -32:32]
        radius = np.hypot(x, y)
        self._sprites = {}
        for index, name in enumerate(self.concepts):
            rgb = np.array(colorsys.hsv_to_rgb(index / len(self.concepts), 0.9, 0.9))
            ring = (radius < 31) & (radius > index % 20)
            self._sprites[name] = np.dstack([*(np.full((64, 64), 255 * v) for v in rgb), 255 * ring]).astype(np.uint8)


@pytest.fixture(scope="module")
def toys():
    return Toys()


def test_psnr_of_known_differences():
    a = np.full((8, 8, 3), 100, np.uint8)
    b = a.copy()
    b[:4] += 10
    where = np.zeros((8, 8), bool)
    where[:4] = True
    assert figures.psnr(a, b, where) == pytest.approx(20 * np.log10(255 / 10))
    assert figures.psnr(a, b) == pytest.approx(20 * np.log10(255 / 10) + 10 * np.log10(2))
    assert figures.psnr(b, a) == figures.psnr(a, b)
    assert figures.psnr(a, a) == figures.psnr(a, b, ~where) == figures.IDENTICAL


def test_a_share_has_an_interval_even_where_all_hit():
    assert figures.share("x", [True] * 64, 60).value == 100
    assert 1 < figures.share("x", [True] * 64).spread < figures.share("x", [True, False] * 32).spread < 15
    assert figures.decibels("x", [20.0, 22.0]).value == 21
    assert figures.decibels("x", [20.0]).spread == 0


def test_hues_are_named_as_the_vocabulary_names_them():
    rng = np.random.default_rng(0)
    everywhere = np.ones((4, 4), bool)
    for hue in rng.uniform(0, 1, 40):
        rgb = colorsys.hsv_to_rgb(hue, 0.8, 0.9)
        flat = np.full((4, 4, 3), [round(255 * v) for v in rgb], np.uint8)
        near = sorted(abs((value - hue + 0.5) % 1 - 0.5) for value in HUES.values())
        if near[1] - near[0] > 0.02:  # Pillow counts hues in 256 steps
            assert main_hue(flat, everywhere) == hue_name(rgb)


def test_hue_shares_count_vivid_pixels_only():
    image = np.full((4, 4, 3), 128, np.uint8)
    where = np.ones((4, 4), bool)
    assert main_hue(image, where) == ""
    image[0, :3] = 20, 60, 250
    image[0, 3] = 250, 20, 20
    assert hue_shares(image, where)["blue"] == pytest.approx(0.75)
    assert main_hue(image, where) == "blue"
    where[0, :3] = False
    assert main_hue(image, where) == "red"


def test_the_mean_around_takes_away_what_stands_on_flat_ground():
    ground = np.full((40, 48, 3), (30, 90, 200), np.uint8)
    mask = np.zeros((40, 48), bool)
    mask[10:20, :15] = True
    image = ground.copy()
    image[12:18, 2:12] = 255
    assert (surround_mean(image, mask) == ground).all()
    assert (surround_mean(image, np.ones_like(mask)) == 128).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cases_ask_for_what_their_kind_says(toys, kind):
    asked = cases(toys, kind, 6, seed=3)
    again = cases(toys, kind, 4, seed=3)
    for case, same in zip(asked, again, strict=False):
        assert case.edit.prompt == same.edit.prompt
        assert case.edit.seed == same.edit.seed
        assert (case.edit.image == same.edit.image).all()
        assert (case.truth == same.truth).all()
    for case in asked:
        changed = (case.edit.image != case.truth).any(2)
        assert changed.any()
        assert not (changed & ~case.edit.mask).any()
        if kind.startswith("remove"):
            assert case.after is None
            assert case.before.concept in HELD_OUT
        else:
            assert case.after.concept in SEEN
        if kind == "insert":
            x0, y0, x1, y1 = bounds(case.edit.mask)
            assert case.edit.mask[y0:y1, x0:x1].all()
            assert case.edit.prompt == case.after.concept
        if kind == "replace":
            assert case.before.concept != case.after.concept
        if kind == "recolour":
            assert case.after.concept in COLOURABLE
            assert figures.coloured(case.truth, case)
            assert not figures.coloured(case.edit.image, case)


def test_a_few_steps_lower_the_loss_of_the_classifier(toys):
    tiles, labels = renders(toys, SEEN, np.random.default_rng(5), 8, rough=True)
    assert tiles.shape == (8, 64, 64, 3)
    torch.manual_seed(0)
    classifier, targets = Classifier(), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(classifier(_pixels(tiles)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_a_finished_classifier_is_kept(toys, tmp_path):
    trained = train_classifier(lambda: toys, tmp_path, CPU, steps=2, batch=4)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)

    def closed():
        raise AssertionError("a finished classifier opens no training data")

    again = train_classifier(closed, tmp_path, CPU, steps=2, batch=4)
    assert (again.ranked(tiles) == trained.ranked(tiles)).all()
    assert sorted(again.ranked(tiles)[0]) == list(range(len(SEEN)))


def test_a_tile_is_the_box_of_the_mask():
    image = np.zeros((64, 80, 3), np.uint8)
    mask = np.zeros((64, 80), bool)
    mask[10:30, 20:50] = True
    image[mask] = 200
    assert tile(image, mask).shape == (64, 64, 3)
    assert (tile(image, mask) == 200).all()


def test_a_crop_with_the_whole_as_its_halo_is_the_whole():
    model = tiny.model("Flux2KleinKVPipeline")
    tokens = figures.encoded(model, tiny.photo(96, 128))
    whole = figures.decoded(model, tokens)
    assert (figures.decode_crop(model, tokens, (17, 45, 33, 80), 128) == whole[17:45, 33:80]).all()
    assert figures.decode_crop(model, tokens, (17, 45, 33, 80), 0).shape == (28, 47, 3)


def test_judging_gives_flat_rows_and_a_sheet(toys, tmp_path, monkeypatch):
    monkeypatch.setattr("retouch.train.cases.SIZES", ((64, 64), (64, 80)))
    monkeypatch.setattr(figures, "TEACHER_STEPS", 8)
    monkeypatch.setattr(figures, "RENDERS", 1)
    engine = Engine(tiny.model("Flux2KleinKVPipeline"))
    classifier = Classifier().eval()
    rows = judge.judge(engine, toys, classifier, n=1, sheet=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert all(set(row) == {"name", "value", "target", "unit", "n", "spread"} for row in rows)
    assert all(np.isfinite([row["value"], row["spread"]]).all() for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == len(rows)
    targets = {name: row["target"] for name, row in by_name.items() if row["target"] is not None}
    assert targets == {
        "autoencoder, photos": 30, "remove on photos": 22, "remove on flat": 30, "insert, top-1": 60, "insert, top-5": 80,
    }  # fmt: skip
    judge.show(rows)
    assert judge.markdown(rows, "here").count("\n| ") == len(rows) + 1


def test_the_card_changes_between_its_marks_only():
    card = f"# retouch-mini\n\n{judge.JUDGED}\nold\n{judge.JUDGED}\n\nmore\n"
    once = judge.with_section(card, "new")
    assert once == f"# retouch-mini\n\n{judge.JUDGED}\nnew\n{judge.JUDGED}\n\nmore\n"
    assert judge.with_section(once, "new") == once
    for wrong in ("no marks", f"{judge.JUDGED} one", judge.JUDGED * 3):
        with pytest.raises(InvalidOption, match="put two"):
            judge.with_section(wrong, "new")


def test_bad_options_are_refused_before_a_model_is_loaded(tmp_path):
    def load(*_args, **_options):
        raise AssertionError("nothing should be loaded")

    with pytest.raises(InvalidOption, match="at least"):
        judge.main(["--n", "0"], load)
    with pytest.raises(InvalidOption, match="--photos"):
        judge.main(["--photos", str(tmp_path)], load)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(InvalidOption, match="model card"):
        judge.main([str(folder), "--card"], load)

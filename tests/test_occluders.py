"""Cut-outs: what is loaded, how they are resized and turned, what they cover, and plans that depend on their key alone."""
import hashlib
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmix_repro.core import DataError, InputError, unpack_zip
from patchmix_repro.cutouts import KINDS, draw_occluder, trim
from patchmix_repro.occluders import (cover, fingerprint, harden, kind_of, load_occluders, paste, read_occluder, resize_occluder,
                                      rotate_occluder)
from patchmix_repro.placing import CANDIDATES, TOLERANCE, Piece, arrange, choose_corner, cut_out, draw_files, occlude, outlines, plan_occlusion

EMBEDDED = load_occluders()


def solid(h, w, colour=(200, 30, 40), alpha=255):
    return np.full((h, w, 4), (*colour, alpha), np.uint8)


# ---- the embedded set ----

def test_the_embedded_bytes_are_pinned():
    together = b"".join(draw_occluder(kind, variant).tobytes() for kind in KINDS for variant in range(3))
    assert hashlib.sha256(together).hexdigest() == "80ecdeaa48739c0ab8833a535a5972fa028ad28ce471fb6a494a72ec8aef9282"


def test_there_are_at_least_eight_kinds_and_none_is_a_class():
    from patchmix_repro.objects import SHAPES
    assert len(KINDS) >= 8 and not set(KINDS) & set(SHAPES)
    assert EMBEDDED.source == "embedded" and set(EMBEDDED.kinds) == set(KINDS)
    assert len(set(EMBEDDED.sha256s)) == len(EMBEDDED.files) == 3 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_cut_out_has_hard_edges_and_no_empty_border(kind):
    rgba = draw_occluder(kind)
    alpha = rgba[..., 3]
    assert set(np.unique(alpha)) == {0, 255} and min(rgba.shape[:2]) >= 40
    assert all(side.any() for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_trim_keeps_every_visible_pixel(h, w, bits):
    alpha = np.array([bits >> i & 1 for i in range(h * w)], np.uint8).reshape(h, w)
    kept = trim(np.dstack([np.zeros((h, w, 3), np.uint8), alpha]))
    rows, columns = np.nonzero(alpha)
    wanted = (np.ptp(rows) + 1, np.ptp(columns) + 1) if len(rows) else (0, 0)
    assert kept.shape[:2] == wanted and kept[..., 3].sum() == alpha.sum()


# ---- loading ----

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_folder_of_kinds_and_a_flat_one(tmp_path):
    for name in ("deep/b kind/x.png", "deep/a/y.PNG", "deep/a/z.png", "flat/donut_0001_2.png", "flat/kite.png"):
        save(tmp_path / name, solid(5, 4))
    (tmp_path / "deep" / "a" / "readme.txt").write_text("no picture")
    (tmp_path / "deep" / ".hidden.png").write_text("no picture")
    deep, flat = load_occluders(tmp_path / "deep"), load_occluders(str(tmp_path / "flat"))
    assert deep.files == ("a/y.PNG", "a/z.png", "b kind/x.png") and deep.kinds == ("a", "a", "b kind")
    assert flat.kinds == ("donut", "kite") and deep.sha256s[1] == flat.sha256s[0] == fingerprint(solid(5, 4))
    assert load_occluders(tmp_path / "deep", leave_out=("a",)).files == ("b kind/x.png",)
    assert load_occluders(tmp_path / "deep", leave_out=("a/y.PNG",)).kinds == ("a", "b kind")


def test_a_palette_with_transparency_has_alpha(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 250, 10, 10])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "p.png", transparency=0)
    assert read_occluder((tmp_path / "p.png").read_bytes())[..., 3].sum() == 15 * 255


def test_a_large_cut_out_is_reduced(tmp_path):
    save(tmp_path / "large.png", solid(30, 2100))
    assert read_occluder((tmp_path / "large.png").read_bytes()).shape[1] == 1024


@pytest.mark.parametrize("array, words", [
    (np.zeros((4, 4, 3), np.uint8), "no alpha channel (mode RGB); save it as an RGBA PNG"), (np.zeros((4, 4), np.uint8), "no alpha channel (mode L)"),
    (solid(4, 4, alpha=0), "fully transparent"), (solid(4, 4, alpha=127), "fully transparent"),
])
def test_a_bad_file_is_named_with_its_remedy(tmp_path, array, words):
    save(tmp_path / "good.png", solid(4, 4))
    save(tmp_path / "kind" / "bad.png", array)
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    with pytest.raises(DataError) as error:
        load_occluders(tmp_path)
    assert f"kind/bad.png: {words}" in str(error.value) and "torn.png: no readable picture" in str(error.value)
    assert "2 bad file(s)" in str(error.value)


def test_an_empty_or_missing_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(DataError, match="no pictures in the folder of occluders .*Put RGBA PNG files"):
        load_occluders(tmp_path)
    with pytest.raises(DataError, match="no folder of occluders .*RGBA pictures, or one of embedded, coco_objects"):
        load_occluders(tmp_path / "nowhere")


def test_leaving_out_names_that_do_not_exist_or_everything():
    with pytest.raises(InputError, match="did you mean 'umbrella'"):
        load_occluders(leave_out=("umbrela",))
    with pytest.raises(InputError, match="leaves no occluder"):
        load_occluders(leave_out=tuple(KINDS))


# ---- resize, turn, harden ----

@given(st.sampled_from(EMBEDDED.files), st.integers(4, 20000), st.floats(-180, 180), st.sampled_from(["keep", "published"]), st.sampled_from(["hard", "soft"]))
@settings(max_examples=60)
def test_an_outline_is_the_alpha_of_its_cut_out(file, area, angle, rule, edge):
    piece = Piece(file, kind_of(file), area, angle, 0, 0, rule, edge)
    assert np.array_equal(cut_out(piece, outlines(EMBEDDED))[..., 0], cut_out(piece, EMBEDDED)[..., 3])


def test_the_two_rules_by_hand():
    "A solid 40 x 10 cut-out to 1600 px: twice each side, or, published, the aspect ratio 4 becomes 16."
    rgba = solid(10, 40)
    assert resize_occluder(rgba, 1600).shape == (20, 80, 4)
    assert resize_occluder(rgba, 1600, "published").shape == (10, 160, 4)
    with pytest.raises(InputError, match="did you mean 'published'"):
        resize_occluder(rgba, 1600, "publish")


@given(h=st.integers(2, 60), w=st.integers(2, 60), area=st.integers(400, 4000))
def test_both_rules_keep_the_area(h, w, area):
    "Against the formulas of the published script, in float64; the second side is chosen so that the area comes out."
    for rule, aspect in (("keep", w / h), ("published", (w / h) ** 2)):
        height, width = resize_occluder(solid(h, w), area, rule).shape[:2]
        assert abs(width - math.sqrt(area * aspect)) <= 0.51 or width == 1
        assert abs(width * height - area) <= width / 2 + 1e-9 or height == 1


def test_the_published_script_in_its_own_words():
    "a = target / visible pixels; width sqrt(a w / h) w, height sqrt(a h / w) h (facts, 4.1), each within rounding."
    rgba = EMBEDDED.image("key/0.png")
    h, w = rgba.shape[:2]
    a = 5000 / (rgba[..., 3] > 0).sum()
    height, width = resize_occluder(rgba, 5000, "published").shape[:2]
    assert abs(width - w * math.sqrt(a * w / h)) <= 0.5 and abs(height - h * math.sqrt(a * h / w)) <= 1


@pytest.mark.parametrize("angle, shape", [(0, (10, 40)), (90, (40, 10)), (180, (10, 40)), (-90, (40, 10))])
def test_right_angles_lose_nothing(angle, shape):
    rgba = solid(10, 40)
    rgba[0, 0, :3] = 7
    turned = rotate_occluder(rgba, angle)
    assert turned.shape[:2] == shape and (turned == np.rot90(rgba, angle // 90 % 4)).all()


@given(angle=st.floats(-180, 180), name=st.sampled_from(EMBEDDED.files))
@settings(max_examples=40)
def test_turning_keeps_area_and_cuts_no_corner(angle, name):
    rgba = resize_occluder(EMBEDDED.image(name), 3000)
    turned = rotate_occluder(rgba, angle)
    assert abs(turned[..., 3].sum() / rgba[..., 3].sum() - 1) < 0.02
    assert trim(turned).shape == turned.shape


def test_colours_of_hidden_pixels_do_not_leak():
    disc = np.zeros((60, 60, 4), np.uint8)
    disc[np.hypot(*np.mgrid[-29.5:30, -29.5:30]) < 25] = 255
    for angle in (0, 33):
        soft = rotate_occluder(resize_occluder(disc, 500), angle)
        assert soft[soft[..., 3] >= 128][:, :3].min() >= 250


def test_hard_edges_are_a_cut_at_half():
    alpha = np.array([[0, 1, 127, 128, 254, 255]], np.uint8)
    rgba = np.dstack([np.full((1, 6, 3), 9, np.uint8), alpha])
    before = rgba.copy()
    assert (harden(rgba)[..., 3] == 255).all() and harden(rgba).shape == (1, 3, 4) and (rgba == before).all()


# ---- paste and cover ----

def slow_paste(image, cutouts, centres):
    "Pixel by pixel, in float64."
    picture, covered = image.astype(float), np.zeros(image.shape[:2], bool)
    for rgba, (x, y) in zip(cutouts, centres):
        h, w = rgba.shape[:2]
        for i in range(h):
            for j in range(w):
                r, c = y - h // 2 + i, x - w // 2 + j
                if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
                    a = rgba[i, j, 3] / 255
                    picture[r, c] = np.floor(picture[r, c] * (1 - a) + rgba[i, j, :3] * a + 0.5 - 1e-9)
                    covered[r, c] |= a >= 0.5
    return picture, covered


@given(st.data())
@settings(max_examples=60)
def test_paste_is_the_slow_form(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    frame = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    image = rng.integers(0, 256, (*frame, 3), np.uint8)
    count = data.draw(st.integers(0, 3))
    cutouts = [rng.integers(0, 256, (*data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7))), 4), np.uint8) for _ in range(count)]
    centres = [data.draw(st.tuples(st.integers(-5, 14), st.integers(-5, 14))) for _ in range(count)]
    before = image.copy()
    picture, covered = slow_paste(image, cutouts, centres)
    found = paste(image, cutouts, centres)
    assert found.dtype == np.uint8 and np.abs(found - picture).max() <= (0 if count < 2 else 1)
    assert (cover(cutouts, centres, frame) == covered).all() and (image == before).all()


def test_by_hand():
    image = np.zeros((4, 4, 3), np.uint8)
    picture, covered = paste(image, [solid(2, 2)], [(1, 1)]), cover([solid(2, 2)], [(1, 1)], (4, 4))
    assert covered.sum() == 4 and (picture[:2, :2] == (200, 30, 40)).all() and picture.sum() == 4 * 270


def test_shares_of_image_and_object_by_hand(tmp_path):
    save(tmp_path / "red.png", solid(10, 10))
    occluders = load_occluders(tmp_path)
    plan = (Piece("red.png", "red", 100, 0.0, 5, 5), Piece("red.png", "red", 100, 0.0, 10, 5))
    thing = np.zeros((20, 20))
    thing[5:15, 5:15] = 1
    found = occlude(np.zeros((20, 20, 3), np.uint8), plan, occluders, thing)
    assert (found.image_share, found.object_share) == (150 / 400, 50 / 100)  # the 50 px under both count once
    assert occlude(np.zeros((20, 20, 3), np.uint8), plan, occluders).object_share is None
    for wrong in (np.zeros((20, 20)), np.ones((5, 5))):
        with pytest.raises(InputError, match="the object mask has shape"):
            occlude(np.zeros((20, 20, 3), np.uint8), plan, occluders, wrong)
    with pytest.raises(InputError, match="unknown occluder 'blue.png'"):
        cut_out(plan[0]._replace(file="blue.png"), occluders)


@pytest.mark.parametrize("wrong", [
    np.zeros((20, 20, 3)), np.zeros((20, 20), np.uint8), np.zeros((20, 20, 4), np.uint8), np.zeros((3, 20, 20), np.uint8), Image.new("RGB", (20, 20)),
])
def test_a_picture_is_uint8_rgb(wrong):
    piece = Piece("key/0.png", "key", 50, 0.0, 10, 10)
    for call in (lambda: occlude(wrong, (piece,), EMBEDDED), lambda: paste(wrong, [solid(2, 2)], [(1, 1)])):
        with pytest.raises(InputError, match="the picture is .*uint8 h w 3"):
            call()


@pytest.mark.parametrize("x, y", [(-500, -500), (10, 300), (float("nan"), 5), (0.5, 0.5), ("3", 3)])
def test_a_cut_out_outside_the_picture_is_an_error(x, y):
    with pytest.raises(InputError, match="leaves it outside the image.*0 to 30.*0 to 20"):
        occlude(np.zeros((20, 30, 3), np.uint8), (Piece("key/0.png", "key", 50, 0.0, x, y),), EMBEDDED)


def test_a_plan_is_for_its_frame():
    plan = plan_occlusion(EMBEDDED, (56, 56), 0.2, 2)
    with pytest.raises(InputError, match="images of 56 x 56 px, this one has 112 x 112"):
        occlude(np.zeros((112, 112, 3), np.uint8), plan, EMBEDDED)
    copy = pickle.loads(pickle.dumps(plan))
    assert (plan.frame, copy.frame, copy) == ((56, 56), (56, 56), plan)
    assert occlude(np.zeros((112, 112, 3), np.uint8), tuple(plan), EMBEDDED).mask.any(), "rows of a table know no frame"


@pytest.mark.parametrize("angle", [float("nan"), float("inf"), "30", None])
def test_an_angle_is_a_finite_number(angle):
    with pytest.raises(InputError, match="Give degrees, a finite number"):
        occlude(np.zeros((20, 20, 3), np.uint8), (Piece("key/0.png", "key", 50, angle, 5, 5),), EMBEDDED)


# ---- plans ----

@given(st.data())
@settings(max_examples=60)
def test_a_corner_lies_inside_or_spans(data):
    frame, extent = (data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40))) for _ in range(2))
    draws = np.array(data.draw(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=CANDIDATES, max_size=CANDIDATES)))
    taken = data.draw(st.lists(st.tuples(*[st.integers(0, 20)] * 2), max_size=3))
    taken = [(t, l, t + 5, l + 5) for t, l in taken]
    corner = choose_corner(draws, extent, frame, taken)
    for c, e, f in zip(corner, extent, frame):
        assert 0 <= c <= f - e or f - e <= c <= 0
    overlap = lambda top, left: sum(max(min(b, top + extent[0]) - max(t, top), 0) * max(min(r, left + extent[1]) - max(l, left), 0) for t, l, b, r in taken)
    spots = []
    for d in draws:
        room = [f - e for f, e in zip(frame, extent)]
        spots.append(tuple(min(r, 0) + int(k) * (abs(r) + 1) // 65536 for r, k in zip(room, d)))
    assert corner == min(spots, key=lambda spot: overlap(*spot))


def test_every_corner_is_equally_likely():
    draws = np.random.default_rng(0).integers(0, 65536, (4000, CANDIDATES, 2))
    tops = np.bincount([choose_corner(d, (7, 7), (10, 10), [])[0] for d in draws], minlength=4)
    assert len(tops) == 4 and (np.abs(tops - 1000) < 5 * np.sqrt(750)).all()


def test_files_are_uniform_and_of_one_kind_unless_mixed():
    counts = np.bincount([EMBEDDED.files.index(draw_files(EMBEDDED, 1, False, 0, i)[0]) for i in range(6000)], minlength=30)
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()
    assert all(len({kind_of(f) for f in draw_files(EMBEDDED, 5, False, 0, i)}) == 1 for i in range(50))
    assert np.mean([len({kind_of(f) for f in draw_files(EMBEDDED, 5, True, 0, i)}) for i in range(200)]) > 3
    assert all(draw_files(EMBEDDED, 3, True, 1, i)[0] == draw_files(EMBEDDED, 1, False, 1, i)[0] for i in range(20))


@pytest.mark.parametrize("number, mixed, rule", [(1, False, "keep"), (4, True, "keep"), (2, False, "published")])
@pytest.mark.parametrize("area", [0.1, 0.4])
def test_a_plan_reaches_its_share(number, mixed, rule, area):
    frame, reached = (60, 80), []
    for sample in range(25):
        plan = plan_occlusion(EMBEDDED, frame, area, number, mixed, rule, seed=3, sample=sample)
        found = occlude(np.zeros((*frame, 3), np.uint8), plan, EMBEDDED)
        assert len(plan) == number and found.mask.mean() == found.image_share
        reached.append(found.image_share / area - 1)
    assert np.mean(np.abs(reached) <= TOLERANCE) >= 0.8 and abs(np.mean(reached)) < 0.03


def test_a_plan_depends_on_seed_and_sample_alone():
    plan = plan_occlusion(EMBEDDED, (56, 56), 0.2, 3, sample=5)
    for sample in range(4):
        plan_occlusion(EMBEDDED, (56, 56), 0.2, 3, sample=sample)
    assert plan == plan_occlusion(EMBEDDED, (56, 56), 0.2, 3, sample=np.int64(5))
    assert plan != plan_occlusion(EMBEDDED, (56, 56), 0.2, 3, sample=6) and plan != plan_occlusion(EMBEDDED, (56, 56), 0.2, 3, seed=1, sample=5)


def test_kind_angle_and_place_stay_when_the_area_grows():
    small, large = (plan_occlusion(EMBEDDED, (112, 112), area, sample=9)[0] for area in (0.05, 0.2))
    assert (small.file, small.angle) == (large.file, large.angle) and small.area < large.area


def test_given_angles_and_places_are_kept():
    plan = plan_occlusion(EMBEDDED, (50, 100), 0.1, 2, angles=(0, 90), positions=((0.25, 0.5), (1.0, 0.5)))
    assert [(p.angle, p.x, p.y) for p in plan] == [(0.0, 25, 25), (90.0, 100, 25)]
    soft = plan_occlusion(EMBEDDED, (50, 50), 0.1, edge="soft")[0]
    assert len(np.unique(cut_out(soft, EMBEDDED)[..., 3])) > 2


@pytest.mark.parametrize("wrong, words", [
    (dict(area=0), "above 0, below 1"), (dict(area=1.0), "above 0, below 1"), (dict(area=float("nan")), "above 0"), (dict(area="0.2"), "above 0"),
    (dict(number=0), "from 1 to 64"), (dict(number=2.0), "from 1 to 64"), (dict(rule="kept"), "did you mean 'keep'"), (dict(edge="harder"), "did you mean 'hard'"),
    (dict(angles=(1.0, 2.0)), "2 angles for 1"), (dict(positions=()), "0 positions for 1"),
    (dict(angles=(float("nan"),)), "angles hold nan"), (dict(angles=("30",)), "degrees, finite"), (dict(angles=30.0), "no list of angles for 1"),
    (dict(positions=((3, 3),)), "shares of width and height, 0 to 1"), (dict(positions=((-0.1, 0.5),)), "0 to 1"), (dict(positions=((0.5, float("nan")),)), "0 to 1"),
    (dict(positions=(0.5,)), "0 to 1"),
])
def test_impossible_plans_name_the_remedy(wrong, words):
    with pytest.raises(InputError) as error:
        plan_occlusion(EMBEDDED, (20, 20), **wrong)
    assert words in str(error.value)


@given(h=st.integers(1, 30), w=st.integers(1, 30), area=st.floats(0.001, 0.999), number=st.integers(1, 3), sample=st.integers(0, 10**6))
@settings(max_examples=30)
def test_any_frame_and_share_give_a_plan(h, w, area, number, sample):
    plan = plan_occlusion(EMBEDDED, (h, w), area, number, sample=sample)
    found = occlude(np.zeros((h, w, 3), np.uint8), plan, EMBEDDED)
    assert len(plan) == number and 0 <= found.image_share <= 1


def test_arrange_gives_every_piece_the_area():
    draws = np.zeros((2, 1 + 2 * CANDIDATES), int)
    pieces = arrange(EMBEDDED, ["key/0.png", "gem/1.png"], 70, (30, 30), draws, None, None, "keep", "hard")
    assert [(p.area, p.angle, p.kind) for p in pieces] == [(70, -180.0, "key"), (70, -180.0, "gem")]


# ---- photographed cut-outs ----

def test_the_coco_cut_outs(shared_data, tmp_path, monkeypatch):
    if not (shared_data / "coco_objects.zip").is_file():
        pytest.skip("no coco_objects.zip in the folder that PATCHMIX_DATA names")
    monkeypatch.setenv("PATCHMIX_DATA", str(shared_data))
    named = load_occluders("coco_objects")
    assert not {"giraffe", "tie"} & set(named.kinds) and {"giraffe", "tie"} < set(load_occluders("coco_objects", leave_out=()).kinds)
    folder = unpack_zip(shared_data / "coco_objects.zip", tmp_path / "coco") / "coco_objects" / "occluders"
    flat = load_occluders(folder, leave_out=("giraffe", "tie"))
    assert len(flat.files) == 57 and flat.kinds == named.kinds and flat.sha256s == named.sha256s
    assert [Path(f).name for f in named.files] == list(flat.files)
    reached = [occlude(np.zeros((112, 112, 3), np.uint8), plan_occlusion(named, (112, 112), 0.3, sample=i), named).image_share for i in range(30)]
    assert np.mean(np.abs(np.array(reached) / 0.3 - 1) <= TOLERANCE) > 0.8

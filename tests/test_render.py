"""render.py: cameras against views worked by hand, triangles against their corners, sheets."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import render
from render import (Camera, Cell, corners, draw_boxes, draw_mesh, draw_points, fit, into_room, look,
                    project, save, sheet)
from run import InputError

ZERO = np.zeros(3)
X, Y, Z = torch.eye(3)


# --- cameras --------------------------------------------------------------------------------------

@pytest.mark.parametrize("elevation, azimuth, right, above, near", [
    (0, 0, Y, Z, X),                        # from +x: y is on the right, z above, x nearest
    (0, 90, -X, Z, Y),
    (0, 180, -Y, Z, -X),
    (90, 0, Y, -X, Z),                      # from above, x points down in the picture
    (-90, 0, Y, X, -Z)])
def test_a_camera_sees_the_axes_where_they_are_by_hand(elevation, azimuth, right, above, near):
    camera = Camera(look(elevation, azimuth), ZERO, 2.0)
    place = project(torch.stack([right, above, near, -near]), camera, 80, 100)
    expected = [[70, 40, 0], [50, 20, 0], [50, 40, -1], [50, 40, 1]]    # 20 pixels are 1
    torch.testing.assert_close(place, torch.tensor(expected).float(), atol=1e-4, rtol=0)


def test_with_y_up_the_same_views_turn_about_y():
    turned = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])          # z, x, y for x, y, z
    for elevation, azimuth in ((0, 0), (25, 35), (-40, 200)):
        z_up = project(torch.eye(3), Camera(look(elevation, azimuth), ZERO, 1.0), 9, 9)
        y_up = project(turned, Camera(look(elevation, azimuth, "y"), ZERO, 1.0), 9, 9)
        torch.testing.assert_close(z_up, y_up)
    axes = look(0, 0, "y")                                              # from +z, as on a screen
    np.testing.assert_allclose(axes, [[1, 0, 0], [0, 1, 0], [0, 0, -1]], atol=1e-12)


def test_views_do_not_mirror():
    for up in "zy":
        for elevation, azimuth in ((0, 0), (25, 35), (-90, 10), (90, 250)):
            axes = look(elevation, azimuth, up)
            np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
            right, above, away = axes
            np.testing.assert_allclose(np.cross(right, above), -away, atol=1e-12)


def test_perspective_halves_what_is_twice_as_far_and_loses_what_is_behind():
    camera = Camera(look(0, 0), ZERO, 1.0, distance=2.0)                # the eye is at x = 2
    place = project(torch.tensor([[0.0, 1, 0], [-2, 1, 0], [1, 1, 0], [2.5, 0, 0]]), camera, 10, 10)
    torch.testing.assert_close(place[:3], torch.tensor([[10.0, 5, 2], [7.5, 5, 4], [15, 5, 1]]))
    assert place[3].isnan().all()


@pytest.mark.parametrize("distance", [math.inf, 1.8])
@pytest.mark.parametrize("up", ["z", "y"])
def test_fit_shows_all_of_a_cloud_and_little_else(distance, up):
    xyz = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3, 1, .2])
    place = project(xyz + 50, fit(xyz + 50, look(30, 20, up), distance), 100, 100)[:, :2]
    low, high = place.amin(0), place.amax(0)
    assert (low >= 0).all() and (high <= 100).all()
    assert (high - low).amax() == pytest.approx(100 / 1.05, abs=1)
    torch.testing.assert_close(low + high, torch.full((2,), 100.0), atol=1, rtol=0)


def test_one_point_fits():
    picture = draw_points(torch.ones(1, 3), fit(torch.ones(1, 3), look(25, 35)), 20, 20)
    assert (picture[10, 10] < 255).all() and (picture[0] == 255).all()


def test_a_room_is_seen_without_its_ceiling_and_its_far_walls_from_inside():
    g = torch.linspace(0, 4, 30)
    wall = torch.stack([g.repeat(30), torch.full((900,), 4.0), g.repeat_interleave(30)], 1)
    low = torch.stack([g.repeat(30), g.repeat_interleave(30), torch.zeros(900)], 1)
    room = torch.cat([wall, low, low + torch.tensor([0, 0, 4.0])])
    shown, camera = into_room(room)
    assert shown[900:1800].all() and not shown[1800:].any()             # the floor, the ceiling
    rows = project(room, camera, 100, 100)[:, 1]
    assert rows[870:900].mean() < rows[900:1800].mean()                 # the far wall is above
    tall = torch.tensor([[0.5, 0.5, 2.0, 1.0, 1.0, 8.0]])
    for boxes, inside in ((None, False), (tall, True)):
        _, camera = into_room(room, boxes)
        place = project(corners(tall)[0], camera, 100, 100)[:, :2]
        assert ((0 < place) & (place < 100)).all().item() == inside


# --- points ---------------------------------------------------------------------------------------

def test_the_nearer_of_two_points_is_drawn_in_its_colour():
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0.5, 0]])
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    camera = Camera(look(0, 0), ZERO, 1.0)
    picture = draw_points(xyz, camera, 20, 20, rgb, radius=3)
    assert picture.shape == (20, 20, 3) and picture.dtype == np.uint8
    assert picture[9, 9].tolist() == [0, 255, 0]                        # x = 1 is nearer
    assert picture[9, 15].tolist() == [0, 0, 255]                       # y is on the right
    assert (picture[0] == 255).all() and (picture[:, 0] == 255).all()
    picture = draw_points(xyz, Camera(look(0, 180), ZERO, 1.0), 20, 20, rgb, radius=3)
    assert picture[9, 9].tolist() == [255, 0, 0]                        # from behind
    assert picture[9, 5].tolist() == [0, 0, 255]


def test_without_colours_near_points_are_darker_and_points_behind_an_eye_are_left_out():
    xyz = torch.tensor([[1.0, 0.5, 0], [-1, -0.5, 0], [9, 0, 0]])
    picture = draw_points(xyz, Camera(look(0, 0), ZERO, 1.0, distance=4.0), 40, 40, radius=2)
    far, near = picture[20, 11].tolist(), picture[20, 32].tolist()      # 9 is behind the eye at 4
    assert near == list(render.NEAR) and far == list(render.FAR)


def test_a_surface_is_darker_behind_the_edge_of_a_nearer_one():
    depth = torch.full((20, 20), 1.0)
    depth[:, :10] = 0.5
    depth[0] = math.inf
    brightness = render.shade(depth)
    assert (brightness[5:15, :10] == 1).all() and (brightness[5:15, 13:] == 1).all()
    assert (brightness[5:15, 10] < 0.8).all() and (brightness[0] < 1).all()
    assert brightness.isfinite().all()


# --- meshes ---------------------------------------------------------------------------------------

LOOPS = [render.triangles_numpy] + ([render.triangles_loop] if render.numba else [])


def raster(loop, p, faces, H, W):
    index, depth = np.full((H, W), -1), np.full((H, W), np.inf)
    loop(np.array(p, float), np.array(faces), index, depth)
    return index, depth


@pytest.mark.parametrize("loop", LOOPS)
def test_a_triangle_covers_the_pixels_counted_by_hand(loop):
    # corners in the centres of pixels (1, 1), (1, 4), (4, 1): the border belongs to it
    index, depth = raster(loop, [[1.5, 1.5, 0], [4.5, 1.5, 3], [1.5, 4.5, 6]], [[0, 1, 2]], 6, 6)
    assert (index + 1).tolist() == [[0, 0, 0, 0, 0, 0],
                                    [0, 1, 1, 1, 1, 0],
                                    [0, 1, 1, 1, 0, 0],
                                    [0, 1, 1, 0, 0, 0],
                                    [0, 1, 0, 0, 0, 0],
                                    [0, 0, 0, 0, 0, 0]]
    assert depth[1, 1:5].tolist() == [0, 1, 2, 3] and depth[1:5, 1].tolist() == [0, 2, 4, 6]
    other_way, _ = raster(loop, [[1.5, 1.5, 0], [4.5, 1.5, 3], [1.5, 4.5, 6]], [[0, 2, 1]], 6, 6)
    assert (other_way == index).all()                                   # either side is seen


@pytest.mark.parametrize("loop", LOOPS)
def test_the_nearest_triangle_wins_and_at_a_tie_the_first(loop):
    square = [[0, 0], [9, 0], [0, 9], [9, 9]]
    p = [[*xy, z] for z in (2, 1, 1, -3) for xy in square]
    faces = [[4 * k + i for i in f] for k in range(4) for f in ((0, 1, 2), (1, 2, 3))]
    index, depth = raster(loop, p, faces[:6], 9, 9)
    assert set(index.flatten()) == {2, 3} and (depth == 1).all()
    index, depth = raster(loop, p, faces, 9, 9)
    assert set(index.flatten()) == {6, 7} and (depth == -3).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_triangles_outside_flat_or_without_a_place_draw_nothing(loop):
    nan = np.nan
    p = [[1, 1, 0], [5, 5, 0], [3, 3, 0],                               # on one line
         [-9, -9, 0], [-1, -9, 0], [-9, -1, 0], [99, 1, 0], [99, 9, 0], [1e9, 1, 0],
         [1, 1, 0], [5, 1, 0], [nan, nan, nan]]
    index, _ = raster(loop, p, np.arange(12).reshape(4, 3), 8, 8)
    assert (index == -1).all()
    p = [[-1e7, -1e7, 0], [1e7, -1e7, 0], [0, 1e7, 0]]                  # far around the picture
    assert (raster(loop, p, [[0, 1, 2]], 8, 8)[0] == 0).all()


def test_both_ways_to_draw_triangles_give_the_same_picture():
    if not render.numba:
        pytest.skip("needs numba: compares its loop with NumPy")
    rng = np.random.default_rng(0)
    for scale in (40, 4):
        p = np.concatenate([rng.uniform(-10, 40, (60, 2)), rng.normal(size=(60, 1))], 1)
        p[::3, :2] = (p[::3, :2] / scale).round() * scale               # corners that coincide
        faces = rng.integers(60, size=(80, 3))
        a, b = (raster(loop, p, faces, 30, 25) for loop in LOOPS)
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert len(np.unique(a[0])) > 10


CUBE = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
FACES = np.array([(0, 1, 3), (0, 3, 2), (4, 5, 7), (4, 7, 6), (0, 4, 6), (0, 6, 2),
                  (1, 5, 7), (1, 7, 3), (0, 1, 5), (0, 5, 4), (2, 3, 7), (2, 7, 6)])


def test_faces_of_a_cube_are_lit_by_lamberts_law():
    camera = Camera(look(0, 0), ZERO, 2.0)                              # sees the face x = 1
    for light, share in (((1, 0, 0), 1.05), ((0, 1, 0), 0.3), ((-1, 0, 1), 0.3 + 0.75 / 2 ** 0.5)):
        picture = draw_mesh(CUBE, FACES, camera, 16, 16, rgb=(100, 200, 40), light=light,
                            background=(7, 8, 9))
        assert picture[8, 8].tolist() == [int(c * share + 0.5) for c in (100, 200, 40)]
        assert picture[0, 0].tolist() == [7, 8, 9]
        inside = (picture != (7, 8, 9)).any(2)
        assert inside.sum() == 64 and inside[4:12, 4:12].all()          # half of each side
    colours = np.zeros((12, 3))
    colours[2:4] = 90                                                   # x = 1
    assert draw_mesh(CUBE, FACES, camera, 16, 16, colours, (1, 0, 0))[8, 8].tolist() == [95] * 3


def test_in_perspective_a_slanted_face_dives_into_a_level_one_where_it_should():
    # from z = 3 down to -3, seen from z = 6: linear depth would put the seam at x = -2.7, not at 0
    slanted = [(-4, -2, 3), (4, -2, -3), (-4, 2, 3), (4, 2, -3)]
    level = [(-9, -9, 0), (9, -9, 0), (-9, 9, 0), (9, 9, 0)]
    quads = np.array([(0, 1, 3), (0, 3, 2)])
    colours = np.array([(200, 0, 0)] * 2 + [(0, 0, 200)] * 2)
    picture = draw_mesh(np.array(slanted + level, float), np.concatenate([quads, quads + 4]),
                        Camera(look(90, 0), ZERO, 5.0, distance=6.0), 100, 100, colours, (0, 0, 1))
    red = picture[:, 50, 0] > picture[:, 50, 2]       # x points down: 10 rows are 1
    assert red[2:49].all() and not red[52:].any()


# --- sheets and files -----------------------------------------------------------------------------

def test_the_edges_of_a_box_are_drawn_where_it_is():
    blank = np.full((50, 50, 3), 255, np.uint8)
    camera = Camera(look(0, 0), ZERO, 1.0)
    picture = draw_boxes(blank, [[0, 0, 0, 1, 1, 0.8]], camera, (0, 200, 0))
    drawn = (picture != 255).any(2)
    assert np.flatnonzero(drawn.any(0))[[0, -1]].tolist() == pytest.approx([12.5, 37], abs=1)
    assert np.flatnonzero(drawn.any(1))[[0, -1]].tolist() == pytest.approx([15, 34.5], abs=1)
    assert not drawn[20:30, 18:32].any() and (blank == 255).all()
    assert (draw_boxes(blank, np.zeros((0, 6)), camera, (0, 200, 0)) == 255).all()


def test_a_sheet_places_pictures_frames_captions_and_legend():
    colours = (10, 0, 90), (0, 90, 10), (90, 10, 0)
    pictures = [np.tile(np.uint8(c), (30, 40, 1)) for c in colours]
    cells = [Cell(pictures[0], "one\nline two"), Cell(pictures[1], "", (220, 50, 40)),
             Cell(pictures[2], "a name that is far too long for its picture")]
    image = sheet(cells, 2, "title", [("chair", (1, 2, 3)), ("desk", (4, 5, 6))])
    assert image.shape[1] == 2 * (40 + 2 * render.GAP)
    for c in colours:
        where = np.argwhere((image == c).all(2))
        assert np.ptp(where, axis=0).tolist() == [29, 39] and len(where) == 1200    # whole
    framed = (image == (220, 50, 40)).all(2)
    assert framed.sum() > 200 and framed[:, :50].sum() == 0             # of the second one alone
    for colour in ((1, 2, 3), (4, 5, 6)):
        assert (image == colour).all(2).sum() > 100
    plain = sheet([Cell(p) for p in pictures], 2)
    assert plain.shape[0] == 2 * (30 + 2 * render.GAP)


def test_a_title_is_broken_between_words_to_fit():
    font = render.ImageFont.load_default(render.TEXT)
    title = "z points up, as in the run's data; antidisestablishmentarianism"
    lines = render.wrapped(title, font, 140)
    assert " ".join(lines) == title
    assert len(lines) > 2 and all(font.getlength(line) <= 140 for line in lines[:-1])
    cell = render.Cell(np.full((10, 140, 3), 255, np.uint8), "")
    one, two = (render.sheet([cell], 1, text) for text in ("z up", "z points up in the run's data"))
    assert two.shape[0] == one.shape[0] + render.TEXT + 4


def test_captions_are_cut_to_fit_and_any_letter_may_occur():
    font = render.ImageFont.load_default(render.TEXT)
    assert render.shortened("chair", font, 90) == "chair"
    cut = render.shortened("a very long name of a class", font, 90)
    assert cut.startswith("a very") and cut.endswith("…") and font.getlength(cut) <= 90
    sheet([Cell(np.zeros((40, 40, 3), np.uint8), "椅子 Stühle \udcff")], 1, "стул")


def test_a_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    save(tmp_path / "new" / "a.png", picture)
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == picture).all()
    before = (tmp_path / "new" / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render.os, "replace", full)
    with pytest.raises(InputError, match="cannot be written .No space left"):
        save(tmp_path / "new" / "a.png", picture // 2)
    assert (tmp_path / "new" / "a.png").read_bytes() == before


def test_accents_are_left_away_since_the_font_has_none():
    picture = np.full((30, 120, 3), 255, np.uint8)
    names = [render.sheet([render.Cell(picture, name)], 1, name, [(name, (9, 9, 9))])
             for name in ("Stühle", "Stuhle", "Stahle")]
    assert (names[0] == names[1]).all() and (names[1] != names[2]).any()

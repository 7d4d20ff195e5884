"""Image references: nothing outside the root is read, damaged pictures are ImageErrors."""

import io
import multiprocessing
import os
import random
import zipfile

import pytest
from PIL import Image

from mmkd.data import pictures, samples
from mmkd.data.samples import ImageRef, Question, Sample, Turn
from mmkd.errors import DataError, ImageError


def png(color="red", size=(4, 3), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png("blue"))
    return folder


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("sub/a.png", png())
    return path


def test_a_picture_of_a_folder_and_of_a_zip(root, archive):
    for place in (root, archive):
        ref = ImageRef.inside(place, "sub/a.png")
        assert ref.load().size == (4, 3)
        assert ref.key == f"{place}/sub/a.png"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/passwd"])
def test_a_name_that_leaves_its_root_is_refused(root, archive, name):
    for place in (root, archive):
        with pytest.raises(DataError, match="leaves its"):
            ImageRef.inside(place, name)


def test_a_backslash_does_not_leave_an_archive_either(archive):
    with pytest.raises(DataError, match="leaves its archive"):
        ImageRef.inside(archive, "..\\secret.png")


def test_a_link_out_of_the_root_is_refused_and_one_inside_is_not(root, tmp_path):
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outside").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "sub/a.png")
    for name in ("out.png", "outside/secret.png"):
        with pytest.raises(DataError, match="leaves its root"):
            ImageRef.inside(root, name)
    assert ImageRef.inside(root, "in.png").load().size == (4, 3)


def test_a_root_that_is_itself_a_link_is_fine(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert ImageRef.inside(tmp_path / "link", "sub/a.png").load().size == (4, 3)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000 + ".png"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_data(root, name):
    with pytest.raises(DataError):
        ImageRef.inside(root, name).load()


@pytest.mark.parametrize("data", [b"", b"no picture", png()[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 60])
def test_a_damaged_picture_is_an_image_error(root, data):
    (root / "bad.png").write_bytes(data)
    with pytest.raises(ImageError, match="bad.png does not decode"):
        ImageRef.inside(root, "bad.png").load()


def test_a_missing_picture_is_an_image_error(root, archive, tmp_path):
    for place in (root, archive, tmp_path / "none.zip"):
        with pytest.raises(ImageError, match="none.png cannot be read"):
            ImageRef.inside(place, "none.png").load()
    with pytest.raises(ImageError, match="cannot be read"):
        ImageRef.inside(root, "sub").load()


def test_a_damaged_archive_is_an_image_error(archive, tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(ImageError, match="cannot be read"):
        ImageRef.inside(tmp_path / "no.zip", "a.png").load()
    data = bytearray(archive.read_bytes())
    data[45:60] = b"\xff" * 15  # in the member: its checksum is wrong now
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(ImageError, match="cannot be read"):
        ImageRef.inside(tmp_path / "bad.zip", "sub/a.png").load()


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(root, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 11)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="4 x 3 pixels"):
        ImageRef.inside(root, "sub/a.png").load()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(root, mode):
    path = root / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (2, 2)).save(path)
    assert ImageRef.inside(root, path.name).load().mode == "RGB"


def _read(ref, wanted, times):
    try:
        return all(ref.read_bytes() == wanted for _ in range(times))
    except ImageError:
        return False


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers_do_not_disturb_each_others_reading(tmp_path):
    path, rng = tmp_path / "many.zip", random.Random(0)
    members = [rng.randbytes(1_000) for _ in range(8)]
    with zipfile.ZipFile(path, "w") as opened:
        for number, data in enumerate(members):
            opened.writestr(f"{number}.png", data)
    refs = [ImageRef.inside(path, f"{number}.png") for number in range(8)]
    assert refs[0].read_bytes() == members[0]  # the parent has the archive open before it forks
    with multiprocessing.get_context("fork").Pool(4) as pool:
        tasks = [(ref, data, 1_000) for ref, data in zip(refs, members, strict=True)]
        assert all(pool.starmap(_read, tasks, chunksize=1))


def test_a_sample_knows_its_prompt_its_answer_and_its_blind_form():
    ref = ImageRef(root="r", name="a.png")
    turns = (Turn("user", "What?", images=1), Turn("assistant", "A star."))
    sample = Sample("1", (ref,), turns, {"question": Question("1", "What?")})
    assert (sample.prompt_turns, sample.answer) == (turns[:1], "A star.")
    assert Sample("1", (ref,), turns[:1]).answer == ""
    blind = sample.without_images()
    assert (blind.images, [t.images for t in blind.turns]) == ((), [0, 0])
    assert [t.text for t in blind.turns] == ["What?", "A star."]
    assert blind.meta is sample.meta


def test_links_below_a_root_are_followed_wherever_they_stand(tmp_path):
    """A folder or file that is a link may lead inside the root, not out of it; also after its neighbours were looked up."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a" / "b", outside):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"x")
    (root / "in").symlink_to(root / "a")
    (root / "out").symlink_to(outside)
    (root / "a" / "file.png").symlink_to(outside / "x.png")
    (root / "a" / "near.png").symlink_to(root / "a" / "b" / "x.png")
    for _ in range(2):
        for name in ("a/b/x.png", "in/b/x.png", "a/near.png", "a/./b/x.png", "not/there.png"):
            assert ImageRef.inside(root, name).name == name
        for name in ("out/x.png", "a/file.png", "in/file.png", "a/../../outside/x.png", str(outside / "x.png")):
            with pytest.raises(DataError, match="leaves its root"):
                ImageRef.inside(root, name)


def test_names_stay_inside_their_root_exactly_where_resolving_them_does(tmp_path):
    """Random names over folders, files, links that lead in, out and round in circles, and what is special in names."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a" / "b").mkdir(parents=True)
    (outside / "a").mkdir(parents=True)
    for name, target in {"in": root / "a", "out": outside, "a/up": root, "a/away": tmp_path, "b": root / "a" / "b"}.items():
        (root / name).symlink_to(target)
    (outside / "a" / "back").symlink_to(root / "a")
    parts = ("a", "b", "in", "out", "up", "away", "back", "root", "x.png", ".", "..", "", "c:", "y\\z", "...", "\u00e9")
    drawn = random.Random(0)
    found = {True: 0, False: 0}
    for _ in range(3000):
        name = "/".join(drawn.choices(parts, k=drawn.randint(1, 5)))
        expected = (root / name).resolve().is_relative_to(root)
        try:
            ImageRef.inside(root, name)
            inside = True
        except DataError:
            inside = False
        assert inside == expected, name
        found[inside] += 1
    assert min(found.values()) > 300


def test_only_regular_files_of_a_bearable_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no regular file"):
        ImageRef.inside(tmp_path, "pipe.png").load()
    assert not ImageRef.inside(tmp_path, "pipe.png").exists()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(200_000))
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    monkeypatch.setattr(samples, "MAX_BYTES", 100_000)
    for ref in (ImageRef.inside(tmp_path / "bomb.zip", "a.png"), ImageRef.inside(tmp_path, "large.png")):
        with pytest.raises(ImageError, match="has 200,000 bytes, over 100,000"):
            ref.load()


def test_a_name_that_no_file_can_have_is_not_there(tmp_path):
    assert not ImageRef(tmp_path, "x" * 5000).exists()

import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from offramp_contract.errors import ManifestError
from offramp_contract.files import BundleFiles, FolderFiles, ZipFiles, open_files

CONTENT = {"manifest.json": b"{}", "stages/00.onnx": b"zero" * 100, "stages/01.onnx": b""}


def make_folder(parent: Path) -> Path:
    for name, content in CONTENT.items():
        (parent / "net" / name).parent.mkdir(parents=True, exist_ok=True)
        (parent / "net" / name).write_bytes(content)
    return parent / "net"


def make_zip(parent: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(parent / "net.zip", "w", compression) as archive:
        if prefix:
            archive.mkdir(prefix)
        for name, content in CONTENT.items():
            archive.writestr(prefix + name, content)
    return parent / "net.zip"


def make_zip_of_folder(parent: Path) -> Path:
    return make_zip(parent, "net/")


def make_stored_zip(parent: Path) -> Path:
    return make_zip(parent, compression=zipfile.ZIP_STORED)


@pytest.fixture(params=[make_folder, make_zip, make_zip_of_folder, make_stored_zip])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> BundleFiles:
    make: Callable[[Path], Path] = request.param
    return open_files(make(tmp_path))


def test_a_folder_and_its_zip_read_the_same(files: BundleFiles) -> None:
    assert files.name == "net"
    for name, content in CONTENT.items():
        assert files.has(name)
        assert files.read(name) == content


@pytest.mark.parametrize("path", ["stages/09.onnx", "stages", "nothing", "manifest.json/x", "a" * 300, "a" * 5000])
def test_what_is_not_a_file_of_the_bundle_is_missing(files: BundleFiles, path: str) -> None:
    assert not files.has(path)
    with pytest.raises(ManifestError, match=r"is missing from the bundle 'net'"):
        files.read(path)


def test_a_file_over_the_limit_is_not_read(files: BundleFiles) -> None:
    assert len(files.read("stages/00.onnx", max_bytes=400)) == 400
    with pytest.raises(ManifestError, match=r"'stages/00\.onnx' is over 399 bytes"):
        files.read("stages/00.onnx", max_bytes=399)


@pytest.mark.parametrize(
    "path", ["../secret", "stages/../../secret", "/etc/passwd", "link", "linked/secret", "\0", "\ud800"]
)
def test_nothing_outside_the_bundle_is_read(files: BundleFiles, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    if (tmp_path / "net").is_dir():
        (tmp_path / "net/link").symlink_to(tmp_path / "secret")
        (tmp_path / "net/linked").symlink_to(tmp_path)
    with pytest.raises(ManifestError):
        files.read(path)


def test_a_link_that_leads_out_of_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    for ask in (FolderFiles(folder).read, FolderFiles(folder).has):
        with pytest.raises(ManifestError, match=r"'link' leaves the bundle's folder"):
            ask("link")


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "same").symlink_to(folder / "stages/00.onnx")
    assert FolderFiles(folder).read("same") == CONTENT["stages/00.onnx"]


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "round").symlink_to("round")
    with pytest.raises(ManifestError, match="round"):
        FolderFiles(folder).read("round")


def test_a_pipe_is_no_file_of_a_bundle(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    os.mkfifo(folder / "pipe")
    with pytest.raises(ManifestError, match="missing"):
        FolderFiles(folder).read("pipe")


def test_a_bundle_folder_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "current").symlink_to("net")
    assert open_files(tmp_path / "current").read("manifest.json") == b"{}"


@pytest.mark.parametrize("name", ["absent", "absent.zip", "net.tar", "manifest.json"])
def test_what_is_neither_folder_nor_zip_is_refused(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ManifestError, match=f"'{name}' is neither a bundle folder nor a .zip"):
        open_files(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(60)])
def test_a_file_that_only_claims_to_be_a_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.zip").write_bytes(content)
    with pytest.raises(ManifestError, match=r"'net\.zip' is not a readable zip"):
        open_files(tmp_path / "net.zip")


@pytest.mark.parametrize("make", [make_zip, make_stored_zip])
def test_a_zip_with_flipped_bytes_reads_right_or_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    sound = make(tmp_path).read_bytes()
    for seed in range(400):
        chance, broken = random.Random(seed), bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        (tmp_path / "net.zip").write_bytes(broken)
        try:
            files = open_files(tmp_path / "net.zip")
            content = files.read("stages/00.onnx")
        except ManifestError:
            continue
        assert content == CONTENT["stages/00.onnx"], seed


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ManifestError, match="not a readable zip"):
        ZipFiles(archive)


def test_a_member_that_is_larger_than_the_zip_says_is_not_expanded(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("manifest.json", bytes(10_000_000))
    lying = archive.read_bytes().replace(struct.pack("<L", 10_000_000), struct.pack("<L", 10))
    archive.write_bytes(lying)
    with pytest.raises(ManifestError, match="cannot be read"):
        ZipFiles(archive).read("manifest.json", max_bytes=1000)


def test_a_member_that_is_neither_stored_nor_deflated_is_refused(tmp_path: Path) -> None:
    archive = make_stored_zip(tmp_path)
    squeezed = bytearray(archive.read_bytes())
    squeezed[squeezed.index(b"PK\x01\x02") + 10] = zipfile.ZIP_LZMA
    archive.write_bytes(squeezed)
    with pytest.raises(ManifestError, match="compressed in a way other"):
        ZipFiles(archive).read("manifest.json")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    archive = make_stored_zip(tmp_path)
    locked = bytearray(archive.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1  # the directory's "encrypted" bit
    archive.write_bytes(locked)
    with pytest.raises(ManifestError, match="cannot be read"):
        ZipFiles(archive).read("manifest.json")


def test_a_member_with_a_path_out_of_the_zip_is_data_and_never_a_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.writestr("manifest.json", b"{}")
        archive.writestr("../evil", b"evil")
    assert ZipFiles(tmp_path / "net.zip").read("manifest.json") == b"{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.zip"]
    assert not (tmp_path.parent / "evil").exists()


def test_a_zip_whose_folders_are_several_has_its_bundle_at_the_top(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.writestr("one/manifest.json", b"{}")
        archive.writestr("two/manifest.json", b"{}")
    assert not ZipFiles(tmp_path / "net.zip").has("manifest.json")

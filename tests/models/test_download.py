"""Downloads over real HTTP, from a server of the test's own."""

import hashlib
import io
import tarfile

import pytest
from offramp_contract.errors import DataSetError
from offramp_models import load_data
from offramp_models.data import cifar100, fashion_mnist
from offramp_models.data.archive import Member, unpack
from offramp_models.data.origin import Published, download

CONTENT = b"all the pictures" * 1000


def published(url, path):
    content = path.read_bytes()
    return Published(f"{url}/{path.name}", f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


@pytest.fixture
def offered(serve, tmp_path):
    """A file on a server; what the server was asked for; the folder to keep it in."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "pictures.gz").write_bytes(CONTENT)
    url, asked = serve(tmp_path / "site")
    return published(url, tmp_path / "site" / "pictures.gz"), asked, tmp_path / "kept"


def test_a_file_is_downloaded_once(offered):
    file, asked, kept = offered
    for _ in range(2):
        assert download(file, kept).read_bytes() == CONTENT
    assert asked == ["/pictures.gz"]


def test_a_kept_file_that_was_damaged_is_downloaded_again(offered):
    file, asked, kept = offered
    download(file, kept).write_bytes(b"damaged")
    assert download(file, kept).read_bytes() == CONTENT
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "is not the published file, its checksum differs"),
        ({"num_bytes": len(CONTENT) - 1}, "is not the published file, it is larger"),
        ({"name": "nothing.gz"}, "answers 404"),
        ({"port": 1}, "cannot be reached"),
    ],
)
def test_anything_but_the_published_bytes_is_refused_and_not_kept(offered, change, sentence):
    file, _, kept = offered
    url = file.url.replace("pictures.gz", change.get("name", "pictures.gz"))
    if "port" in change:
        url = "http://127.0.0.1:1/pictures.gz"
    other = Published(url, change.get("checksum", file.checksum), change.get("num_bytes", file.num_bytes))
    with pytest.raises(DataSetError, match=sentence) as refused:
        download(other, kept)
    assert "--data-dir or OFFRAMP_DATA" in refused.value.message
    assert not [path for path in kept.rglob("*") if path.is_file()]


def test_fashion_mnist_comes_from_its_origin_when_no_folder_is_named(serve, fashion_folder, monkeypatch):
    url, asked = serve(fashion_folder / "fashion-mnist")
    files = [published(url, fashion_folder / "fashion-mnist" / file.name) for file in fashion_mnist.FILES]
    monkeypatch.setattr(fashion_mnist, "FILES", files)
    for _ in range(2):
        assert len(load_data("fashion_mnist").calibration) == 5000
    assert len(asked) == 4


def test_cifar100_is_taken_out_of_its_archive_once(serve, cifar_folder, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    with tarfile.open(tmp_path / "site" / "cifar.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(cifar_folder / "cifar-100-binary", "cifar-100-binary")
    url, asked = serve(tmp_path / "site")
    monkeypatch.setattr(cifar100, "ARCHIVE", published(url, tmp_path / "site" / "cifar.tar.gz"))
    for _ in range(2):
        assert len(load_data("cifar100").calibration) == 5000
    assert asked == ["/cifar.tar.gz"]


def archive(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def test_only_the_files_that_are_wanted_leave_an_archive(tmp_path):
    whole = archive(tmp_path / "a.tar.gz", ("../evil", b"x"), ("set/a", b"AA"), ("set/other", b"x"), ("set/b", b"B"))
    folder = tmp_path / "in" / "folder"
    unpack(whole, [Member("set/a", 2), Member("set/b", 10)], folder)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files.pop("a.tar.gz")
    assert files == {"in/folder/set/a": b"AA", "in/folder/set/b": b"B"}


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("set/a", b"AAA")], "set/a must be a file of at most 2 bytes"),
        ([("set/a", None)], "set/a must be a file of at most 2 bytes"),
        ([("set/c", b"A")], "lacks set/a"),
        ([], "lacks set/a"),
    ],
)
def test_an_archive_without_the_wanted_file_is_refused(tmp_path, members, sentence):
    with pytest.raises(DataSetError, match=sentence):
        unpack(archive(tmp_path / "a.tar.gz", *members), [Member("set/a", 2)], tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_broken_archive_is_refused_and_leaves_nothing(tmp_path):
    random = hashlib.shake_128(b"").digest(50_000)
    whole = archive(tmp_path / "a.tar.gz", ("set/a", random))
    whole.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(DataSetError, match=r"is no whole \.tar\.gz"):
        unpack(whole, [Member("set/a", 50_000)], tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]

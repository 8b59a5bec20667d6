"""Small data sets in the published formats, and a server to download them from."""

import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offramp_contract.manifest import ImagePreprocessing
from offramp_models.data import Augmentation, ImageDataSet, LabelledImages

NUM_IMAGES = 5100
"""One hundred more than are held out for calibration."""


def pictures(num: int, height: int, width: int) -> np.ndarray:
    """Give uint8 pictures (N, H, W), each told apart by its first two pixels, the rest a gradient."""
    pixels = np.tile(np.arange(height * width, dtype=np.uint8).reshape(height, width), (num, 1, 1))
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(num) % 256, np.arange(num) // 256
    return pixels


def idx(array: np.ndarray) -> bytes:
    """Write bytes as Fashion-MNIST's files hold them."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
    return gzip.compress(header + array.tobytes(), compresslevel=1)


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of Fashion-MNIST, with fewer images."""
    folder = tmp_path_factory.mktemp("data") / "fashion-mnist"
    folder.mkdir()
    for part, num in (("train", NUM_IMAGES), ("t10k", 30)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pictures(num, 28, 28)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((np.arange(num) % 10).astype(np.uint8)))
    return folder.parent


def cifar_rows(num: int) -> np.ndarray:
    """Give CIFAR-100's records: two labels, then red, green and blue planes, told apart by red's first two pixels."""
    rows = np.zeros((num, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = 255, np.arange(num) % 100
    rows[:, 2], rows[:, 3] = np.arange(num) % 256, np.arange(num) // 256
    rows[:, 2 + 1024 :: 1024] = 7
    return rows


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binary files of CIFAR-100, with fewer images."""
    folder = tmp_path_factory.mktemp("data") / "cifar-100-binary"
    folder.mkdir()
    cifar_rows(NUM_IMAGES).tofile(folder / "train.bin")
    cifar_rows(100).tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("".join(f"class {index}\n" for index in range(100)) + "\n")
    return folder.parent


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], tuple[str, list[str]]]]:
    """Serve a folder over HTTP; gives its address and the paths that were asked for. The cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OFFRAMP_DATA", raising=False)
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(folder: Path) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dots() -> ImageDataSet:
    """A data set that is learnt in a few steps: one bright pixel, its row the class; images are varied."""
    random = np.random.default_rng(0)

    def split(num: int) -> LabelledImages:
        labels = random.integers(0, 4, num)
        pixels = np.zeros((num, 8, 8), dtype=np.uint8)
        pixels[np.arange(num), 2 * labels, random.integers(0, 8, num)] = 255
        return LabelledImages(pixels, labels)

    preprocessing = ImagePreprocessing(mode="L", height=8, width=8, mean=(0.1,), std=(0.3,))
    train, calibration, test = split(96), split(32), split(32)
    return ImageDataSet("dots", train, calibration, test, tuple("abcd"), preprocessing, Augmentation(1, flips=True))

"""Downloads, with the network replaced below pooch, or by a server on this machine."""

import gc
import gzip
import hashlib
import http.server
import io
import resource
import signal
import tarfile
import threading

import pooch
import pytest
import requests

from lit_parallel.data import cifar10, download, mnist
from lit_parallel.data.datasets import build_data
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError


@pytest.fixture
def network(monkeypatch):
    """Serve what the test puts into a dictionary from address to content or exception; record each request."""

    class Network(dict):
        def __init__(self):
            super().__init__()
            self.requests = []

    served = Network()

    def get(self, url, output_file, _, check_only=False):
        served.requests.append(url)
        assert self.kwargs["timeout"] == (download.CONNECT_SECONDS, download.READ_SECONDS)
        answer = served.get(url, requests.ConnectionError("a long story\nof sockets"))
        if isinstance(answer, Exception):
            raise answer
        with open(output_file, "wb") as file:
            file.write(answer)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", get)
    return served


@pytest.fixture
def files(monkeypatch):
    """Four tiny official files of MNIST, and their checksums in the place of the published ones."""
    contents = {}
    for i, name in enumerate(mnist.MD5):
        contents[name] = gzip.compress(f"{i}".encode())
        monkeypatch.setitem(mnist.MD5, name, hashlib.md5(contents[name]).hexdigest())
    return contents


def build(name, folder, **options):
    return build_data(DataOptions(name=name, folder=str(folder), **options), seed=0)


def error(data):
    with pytest.raises(UserError) as caught:
        data.prepare_data()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mnist_is_fetched_once(network, files, tmp_path):
    network.update({f"{mnist.MIRRORS[0]}/{name}": content for name, content in files.items()})
    folder = tmp_path / "new" / "folder"
    build("mnist", folder).prepare_data()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    build("mnist", folder).prepare_data()
    assert len(network.requests) == 4


def test_second_mirror_steps_in(network, files, tmp_path):
    network.update({f"{mnist.MIRRORS[1]}/{name}": content for name, content in files.items()})
    build("mnist", tmp_path).prepare_data()
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_only_missing_files_are_fetched_and_none_is_replaced(network, files, tmp_path):
    network.update({f"{mnist.MIRRORS[0]}/{name}": content for name, content in files.items()})
    mine = "train-images-idx3-ubyte"
    (tmp_path / mine).write_bytes(b"mine")
    build("mnist", tmp_path).prepare_data()
    assert (tmp_path / mine).read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {mine, *files} - {f"{mine}.gz"}


def test_offline_is_one_line_after_one_request_per_mirror(network, tmp_path):
    text = error(build("mnist", tmp_path))
    assert f"'train-images-idx3-ubyte.gz' is not in '{tmp_path}' and cannot be downloaded" in text
    assert "ossci-datasets.s3.amazonaws.com: no connection; storage.googleapis.com: no connection" in text
    assert "data.folder" in text
    assert "data.download" in text
    assert len(network.requests) == 2


def test_no_request_when_download_is_false(network, tmp_path):
    assert "data.download is false" in error(build("mnist", tmp_path, download=False))
    assert network.requests == []


def test_wrong_checksum_names_the_file_and_leaves_nothing(network, files, tmp_path):
    network.update({f"{mirror}/{name}": b"something else" for mirror in mnist.MIRRORS for name in files})
    assert "the checksum of train-images-idx3-ubyte.gz is wrong" in error(build("mnist", tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert len(network.requests) == 4  # each mirror twice: a connection may have broken


def test_broken_transfer_is_tried_again(network, tmp_path):
    network[cifar10.URL] = requests.exceptions.ChunkedEncodingError("broken off\nhere")
    assert "(www.cs.toronto.edu: broken off)" in error(build("cifar10", tmp_path))
    assert len(network.requests) == 2


def test_folder_that_cannot_be_written(network, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot store train-images-idx3-ubyte.gz" in error(build("mnist", tmp_path / "file" / "folder"))
    assert network.requests == []


def test_default_folder_is_the_users_cache(network, files, monkeypatch, tmp_path):
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    network.update({f"{mnist.MIRRORS[0]}/{name}": content for name, content in files.items()})
    build_data(DataOptions(name="mnist"), seed=0).prepare_data()
    assert {path.name for path in (tmp_path / "lit-parallel" / "mnist").iterdir()} == set(files)


@pytest.fixture
def archive(monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in (*cifar10.Cifar10Data.file_names, "readme.html"):
            member = tarfile.TarInfo(f"{cifar10.ARCHIVE_FOLDER}/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


def test_cifar10_is_fetched_and_unpacked(network, archive, tmp_path):
    network[cifar10.URL] = archive
    data = cifar10.Cifar10Data(DataOptions(folder=str(tmp_path)), seed=0)
    data.prepare_data()
    for name in data.file_names:
        assert data.path(name).read_text() == name
    build("cifar10", tmp_path).prepare_data()
    assert network.requests == [cifar10.URL]


def test_cifar10_archive_put_there_by_hand_needs_no_network(network, archive, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    kept = tmp_path / cifar10.ARCHIVE_FOLDER / "test_batch.bin"
    kept.parent.mkdir()
    kept.write_text("mine")
    data = cifar10.Cifar10Data(DataOptions(folder=str(tmp_path)), seed=0)
    data.prepare_data()
    assert data.path("data_batch_5.bin").read_text() == "data_batch_5.bin"
    assert kept.read_text() == "mine"
    assert network.requests == []


def test_cifar10_offline(network, tmp_path):
    assert f"'data_batch_1.bin' is not in '{tmp_path}' and cannot be downloaded" in error(build("cifar10", tmp_path))


# -- a real transfer ---------------------------------------------------------------------------------------------------

SIZE = 100_000  # bytes, of the file that the server says it sends


unclosed = pytest.mark.filterwarnings("ignore:.*socket:ResourceWarning")


class Handler(http.server.BaseHTTPRequestHandler):
    sent = SIZE

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        self.wfile.write(bytes(self.sent))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Serves zeros by every name, as the files of MNIST."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{listening.server_port}",))
        for name in mnist.MD5:
            monkeypatch.setitem(mnist.MD5, name, hashlib.md5(bytes(SIZE)).hexdigest())
        yield
        listening.shutdown()
        gc.collect()  # requests leaves the socket of a broken transfer open


@unclosed
def test_a_transfer_that_breaks_off_leaves_nothing(server, monkeypatch, tmp_path):
    monkeypatch.setattr(Handler, "sent", SIZE // 2)
    assert "cannot be downloaded (127.0.0.1: " in error(build("mnist", tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Handler, "sent", SIZE)
    build("mnist", tmp_path).prepare_data()
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == dict.fromkeys(mnist.MD5, SIZE)


@pytest.fixture
def _full_disk():
    """No file can become longer than half of what is sent."""
    allowed, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, allowed[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    signal.signal(signal.SIGXFSZ, handler)


@unclosed
@pytest.mark.usefixtures("server", "_full_disk")
def test_a_full_disk_is_told_and_left_as_it_was(tmp_path):
    assert "cannot store train-images-idx3-ubyte.gz: [Errno 27] File too large" in error(build("mnist", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_so_is_one_that_fills_up_while_files_are_unpacked(network, archive, monkeypatch, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)

    def fill(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fill)
    assert "cannot store cifar-10-binary.tar.gz: [Errno 28] No space left" in error(build("cifar10", tmp_path))
    assert list((tmp_path / cifar10.ARCHIVE_FOLDER).iterdir()) == []

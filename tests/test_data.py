"""Claims about data.py: generated samples, image files and their downloads, text, tokens and windows."""
import ast
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import sysconfig
import tarfile
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call

import config
import data
import sweep

URLOPEN = urllib.request.urlopen
FASHION = Path("/usr/share/datasets/fashion-mnist")
SETTINGS = {"data": "multi_index", "train_size": 50, "val_size": 5, "data_seed": 3, "dtype": "float32",
            "context": 8, "vocab_size": 0}


def offline(*args, **kwargs):
    raise OSError("offline")


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch, tmp_path):
    """No network, no data of this machine, and ./data is in tmp_path."""
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(folder, words, load, *args, **kwargs):
    """load raises an InputError of one line that names the folder, and leaves everything there as it was."""
    before = contents(folder)
    with pytest.raises(data.InputError, match=words) as error:
        load(*args, **kwargs)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert contents(folder) == before
    return str(error.value)


def test_data_imports_torch_numpy_and_the_standard_library_only():
    names = set()
    for node in ast.walk(ast.parse(Path(data.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names}
    assert packages <= {"torch", "numpy", *sys.stdlib_module_names}


# ------------------------------------------------------------------------------------------------------
# Generated samples, splits and batches

def test_multi_index_is_its_formula_on_normal_inputs_and_two_classes_of_equal_size():
    splits = data.load_data("multi_index", data_seed=7)
    generator = data.stream(7, "samples")
    x, x_val = (torch.randn(size, 100, generator=generator) for size in (20_000, 1_000))
    assert torch.equal(splits.x, x) and torch.equal(splits.x_val, x_val) and splits.outputs == 2
    for inputs, labels in ((x, splits.y), (x_val, splits.y_val)):
        positive = inputs.numpy().clip(min=0)
        expected = positive[:, 0] + positive[:, 1] > positive[:, 2] + positive[:, 3]
        assert labels.dtype == torch.int64 and labels.tolist() == expected.tolist()
    # P(1) = (1 - P(tie)) / 2, and all four inputs are negative with probability 1/16
    assert splits.y.float().mean().item() == pytest.approx(15 / 32, abs=0.012)
    assert not torch.equal(data.load_data("multi_index").x, x)
    assert torch.equal(data.load_data("multi_index").x, data.load_data("multi_index", data_seed=0).x)


def test_load_takes_the_data_that_its_settings_name(tmp_path):
    splits = data.load(SETTINGS)
    expected = data.load_data("multi_index", train_size=50, val_size=5, data_seed=3)
    assert all(torch.equal(a, b) for a, b in zip(splits[:4], expected)) and len(splits.y_val) == 5
    assert splits.x.dtype == data.load({**SETTINGS, "dtype": "bfloat16"}).x.dtype == torch.float32
    double = data.load({**SETTINGS, "dtype": "float64"})
    assert double.x.dtype == double.x_val.dtype == torch.float64 and torch.equal(double.x.float(), splits.x)

    write_mnist(tmp_path)
    assert data.load({**SETTINGS, "data": "mnist"}, tmp_path).x_val.shape == (5, 784)
    (tmp_path / "text").write_bytes(bytes(range(100)))
    text = data.load({**SETTINGS, "data": str(tmp_path / "text"), "vocab_size": 120, "val_size": 2})
    assert text.x_val.shape == (2, 8) and text.outputs == 120 and text.y is None
    with pytest.raises(data.InputError, match="'imagenet'; choose from multi_index, mnist, fashion_mnist"):
        data.load_data("imagenet")
    with pytest.raises(ValueError, match="'imagenet' is no file or folder; choose stdlib"):
        data.load({**SETTINGS, "data": "imagenet"})


def test_batches_are_the_samples_of_their_index():
    splits = data.load(SETTINGS)
    index = torch.tensor([[0, 49, 7], [3, 3, 0]])       # (R, B)
    x, y = splits.batch(index)
    assert splits.samples == 50 and torch.equal(x, splits.x[index]) and torch.equal(y, splits.y[index])
    counts = np.bincount(splits.y.numpy(), minlength=2) / 50
    assert splits.frequencies.dtype == torch.float64 and splits.frequencies.tolist() == counts.tolist()
    lonely = splits._replace(y=torch.zeros(50, dtype=torch.int64), outputs=3)
    assert lonely.frequencies.tolist() == [1, 0, 0]


def test_batches_of_text_are_windows_and_the_tokens_after_each(tmp_path):
    content = np.random.default_rng(0).integers(0, 128, 1000, dtype=np.uint8)      # ASCII, so UTF-8
    content.tofile(tmp_path / "text")
    splits = data.load_text(str(tmp_path / "text"), context=8)
    assert splits.samples == 900 - 8
    index = torch.tensor([[0, 5], [splits.samples - 1, 17]])
    x, y = splits.batch(index)
    windows = all_windows(content, 9)[index]        # (R, B, T + 1)
    assert (x.numpy() == windows[..., :8]).all() and (y.numpy() == windows[..., 1:]).all()
    assert torch.equal(splits.frequencies, splits.x.frequencies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_cuda_device_are_those_of_the_cpu(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(200)))
    for name in ("multi_index", str(tmp_path / "text")):
        cpu, cuda = (data.load({**SETTINGS, "data": name}, device=device) for device in ("cpu", "cuda"))
        index = torch.tensor([[0, 5], [9, 1]])
        x, y = cuda.batch(index if cuda.y is None else index.cuda())
        assert x.is_cuda and y.is_cuda and cuda.x_val.is_cuda
        assert all(torch.equal(a.cpu(), b) for a, b in zip((x, y), cpu.batch(index)))
        assert torch.equal(cuda.frequencies.cpu(), cpu.frequencies)


# ------------------------------------------------------------------------------------------------------
# Image files

def write_mnist(folder, images=None, labels=None, zipped=False):
    """Four IDX files; returns the pixels of the training and of the test split."""
    generator, written = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, size in (("train", 30), ("t10k", 10)):
        drawn = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        pixels = drawn if images is None else images
        classes = np.arange(size, dtype=np.uint8) % 10 if labels is None else labels
        files = {f"{prefix}-images-idx3-ubyte": struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes(),
                 f"{prefix}-labels-idx1-ubyte": struct.pack(">2i", 0x801, len(classes)) + classes.tobytes()}
        for name, content in files.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
        written.append(pixels)
    return written


def dark(size, side=28):
    """Black images, but for one white pixel of the first: constant images have no variance."""
    images = np.zeros((size, side, side), np.uint8)
    images[:1, 0, 0] = 255
    return images


def constant(size, label):
    return np.full(size, label, np.uint8)


def write_cifar(folder, size=3, label=3):
    folder.mkdir(parents=True, exist_ok=True)
    for name in data._CIFAR:
        (folder / name).write_bytes(bytes([label, *bytes(3072)]) * size)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_and_gzipped_and_standardized_by_the_training_split(tmp_path, zipped):
    pixels, test_pixels = write_mnist(tmp_path, zipped=zipped)
    splits = data.load_data("mnist", tmp_path, val_size=7)
    assert splits.x.shape == (30, 784) and splits.x_val.shape == (7, 784) and splits.outputs == 10
    assert splits.y.tolist() == [i % 10 for i in range(30)] and splits.y_val.tolist() == list(range(7))
    assert abs(splits.x.mean().item()) < 1e-5 and splits.x.std().item() == pytest.approx(1, abs=1e-4)
    for x, raw in ((splits.x, pixels), (splits.x_val, test_pixels[:7])):
        expected = (raw.reshape(len(raw), -1) - pixels.mean()) / pixels.std(ddof=1)
        assert np.allclose(x.numpy(), expected, atol=1e-5)


def test_a_plain_file_is_read_before_a_gzipped_one(tmp_path):
    write_mnist(tmp_path, zipped=True)
    write_mnist(tmp_path, dark(10), constant(10, 4))
    assert set(data.load_data("mnist", tmp_path).y.tolist()) == {4}


def test_cifar_records_are_a_label_and_3072_bytes(tmp_path):
    records = np.zeros((4, 3073), dtype=np.uint8)
    records[:, 0], records[:, 1] = [3, 1, 4, 1], 255
    for i, name in enumerate(data._CIFAR):
        records[:, 2] = 40 * i
        (tmp_path / name).write_bytes(records.tobytes())
    splits = data.load_data("cifar10", tmp_path)
    assert splits.x.shape == (20, 3072) and splits.y.tolist() == [3, 1, 4, 1] * 5 and splits.outputs == 10
    assert (splits.x[:, 0] > splits.x[:, 1]).all() and (splits.x[:, 1].diff().reshape(-1)[3::4] > 0).all()
    assert splits.x_val.shape == (4, 3072) and (splits.x_val[:, 1] > splits.x[:, 1].max()).all()


@pytest.mark.parametrize("place, root, variable", [
    ("d/mnist", "d", None), ("d", "d", None), ("d/cifar-10-batches-bin", "d", None),
    ("d", "d", "elsewhere"), ("d/mnist", None, "d"), ("d", None, "d"),
    ("data/mnist", None, None), ("data", None, None)])
def test_files_are_found_below_data_dir_else_the_environments_else_data(monkeypatch, place, root, variable):
    write_mnist(Path(place))
    if variable:
        monkeypatch.setenv("DATA_DIR", variable)
    assert len(data.load_data("mnist", root).x) == 30
    for file in Path(place).iterdir():
        file.unlink()
    home = root or variable or "data"
    with pytest.raises(data.InputError, match=rf"offline.*\(plain or .gz\) into {home}/mnist, or name their"):
        data.load_data("mnist", root)


def test_a_folder_of_the_data_sets_name_comes_first_and_packaged_files_come_last(tmp_path, monkeypatch):
    source = data._DATASETS["fashion_mnist"]
    assert source.packaged == (str(FASHION),)
    with monkeypatch.context() as patch:
        patch.setitem(data._DATASETS, "fashion_mnist", source._replace(packaged=("nowhere",)))
        with pytest.raises(data.InputError, match="or install Debian's package dataset-fashion-mnist$"):
            data.load_data("fashion_mnist")
    with pytest.raises(data.InputError, match="or name their folder with --data-dir$"):
        data.load_data("mnist")
    monkeypatch.setitem(data._DATASETS, "fashion_mnist", source._replace(packaged=("packaged",)))
    for place, label in (("packaged", 1), ("data", 2), ("data/fashion_mnist", 3)):
        write_mnist(Path(place), dark(10), constant(10, label))
        assert set(data.load_data("fashion_mnist").y.tolist()) == {label}
    # a folder that was named is the only one
    with pytest.raises(data.InputError, match="^fashion_mnist is missing and could not be downloaded"):
        data.load_data("fashion_mnist", "another")


FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9, 4, 0, 9, 1, 1, 2, 4, 3, 2, 7, 3, 8],
    "fashion_mnist": [
        9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 0, 6, 4, 3, 1, 4, 8, 4, 3, 0, 2, 4, 4, 5, 3]}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name, actual", [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")])
def test_mnist_and_fashion_mnist_are_distinguished_though_their_files_have_the_same_names(
        tmp_path, name, actual, zipped):
    labels = np.array([*FIRST_LABELS[actual], 8, 8], np.uint8)
    images = dark(34)
    write_mnist(tmp_path, images, labels, zipped)
    message = refused(tmp_path, f"holds {actual}, whose files have", data.load_data, name, tmp_path)
    assert f"put those of {name} into {tmp_path / name}, or choose data {actual}" in message
    splits = data.load_data(actual, tmp_path)
    assert splits.y.tolist() == labels.tolist() and splits.outputs == 10
    write_mnist(tmp_path / name, images, labels)       # a folder of the set's own name is trusted
    assert data.load_data(name, tmp_path).y.tolist() == labels.tolist()
    labels[31] += 1
    write_mnist(tmp_path / "others", images, labels, zipped)
    assert data.load_data(name, tmp_path / "others").y.tolist() == labels.tolist()


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_no_mnist():
    refused(FASHION, "holds fashion_mnist", data.load_data, "mnist", FASHION)
    splits = data.load_data("fashion_mnist")
    assert splits.x.shape == (60_000, 784) and splits.x_val.shape == (1_000, 784)
    assert splits.frequencies.tolist() == [0.1] * 10


def edit(file, change):
    """A change of a file's bytes."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


IMAGES, LABELS, TEST_LABELS = data._IDX[0], data._IDX[1], data._IDX[3]


@pytest.mark.parametrize("spoil, words", [
    (edit(IMAGES, lambda b: b[:-5]), "holds 23531 bytes where its header says 23536; delete it"),
    (edit(IMAGES, lambda b: b""), "magic 0x803"),
    (edit(IMAGES, lambda b: b[:9]), "magic 0x803; it is no train-images-idx3-ubyte file"),
    (edit(IMAGES, lambda b: b[:15]), "magic 0x803"),
    (edit(IMAGES, lambda b: b[:16]), "holds 16 bytes where its header says 23536"),
    (edit(IMAGES, lambda b: b"\1" + b[1:]), "magic 0x803"),
    (edit(TEST_LABELS, lambda b: b"not an IDX file"), "magic 0x801"),
    (edit(TEST_LABELS, lambda b: b + b"x"), "holds 19 bytes where its header says 18"),
    (lambda d: (d / IMAGES).write_bytes((d / LABELS).read_bytes()), "magic 0x803"),
    (lambda d: (d / LABELS).replace(d / IMAGES), "offline.*; put train-images-idx3-ubyte"),
    (lambda d: (d / TEST_LABELS).unlink(),
     "put train-images-idx3-ubyte, .* t10k-labels-idx1-ubyte .*--data-dir"),
    (lambda d: [(d / IMAGES).unlink(), (d / IMAGES).mkdir()], "cannot be read: .*Is a directory"),
    (lambda d: write_mnist(d, dark(0), constant(0, 0)), "holds 0 images"),
    (lambda d: write_mnist(d, dark(9), constant(9, 10)),
     "784 values and labels up to 10; mnist has 784 values and classes 0 to 9"),
    (lambda d: write_mnist(d, dark(9, 8), constant(9, 0)),
     "images of 64 values and labels up to 0; mnist has 784 values"),
    (lambda d: write_mnist(d, labels=constant(9, 0)), "30 images but 9 labels"),
    (edit(TEST_LABELS, lambda b: struct.pack(">2i", 0x801, 9) + b[8:-1]), "10 images but 9 labels"),
])
def test_damaged_idx_files_are_named(tmp_path, spoil, words):
    write_mnist(tmp_path)
    spoil(tmp_path)
    refused(tmp_path, words, data.load_data, "mnist", tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda b: b[:-5], "train-images-idx3-ubyte.gz is damaged .*; delete it to download it again"),
    (lambda b: b"plain", "is damaged"),
    (lambda b: b[:99] + bytes(99), "is damaged"),
    (lambda b: b"", "magic 0x803")])
def test_damaged_gzip_files_are_named(tmp_path, change, words):
    write_mnist(tmp_path, zipped=True)
    edit(f"{IMAGES}.gz", change)(tmp_path)
    refused(tmp_path, words, data.load_data, "mnist", tmp_path)


@pytest.mark.parametrize("size, label, spoil, words", [
    (3, 3, edit("data_batch_5.bin", lambda b: b[:-5]),
     "data_batch_5.bin holds 9214 bytes, no multiple of 3073"),
    (0, 0, lambda d: None, "data_batch_1.bin holds 0 bytes, no multiple of 3073"),
    (3, 10, lambda d: None, "labels up to 10; cifar10 has 3072 values and classes 0 to 9"),
    (3, 3, lambda d: (d / "test_batch.bin").unlink(), "put data_batch_1.bin, .*, test_batch.bin"),
])
def test_damaged_cifar_files_are_named(tmp_path, size, label, spoil, words):
    write_cifar(tmp_path, size, label)
    spoil(tmp_path)
    refused(tmp_path, words, data.load_data, "cifar10", tmp_path)


# ------------------------------------------------------------------------------------------------------
# Downloads

@pytest.fixture
def mirror(monkeypatch):
    """A web server on the loopback, serving files[name]; of those in `cut` it sends half and hangs up."""
    files, cut = {}, set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            if name not in files:
                return self.send_error(404)
            sent = files[name][:len(files[name]) // 2] if name in cut else files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"

        def publish(name, packed, md5=None, url=url):
            files.update(packed)
            sums = {file: md5 or hashlib.md5(content).hexdigest() for file, content in packed.items()}
            source = data._DATASETS[name]._replace(mirror=url, md5=sums, packaged=())
            monkeypatch.setitem(data._DATASETS, name, source)
        yield SimpleNamespace(publish=publish, files=files, cut=cut)
        server.shutdown()


def zipped_mnist(folder):
    write_mnist(folder, zipped=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def archive(members):
    """A .tar.gz of (TarInfo or name, bytes)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_every_file_that_is_needed_can_be_downloaded():
    for name in ("mnist", "fashion_mnist"):
        assert data._DATASETS[name].md5.keys() == {f"{file}.gz" for file in data._IDX}
        assert data._DATASETS[name].files == data._IDX
    assert data._DATASETS["cifar10"].md5.keys() == {"cifar-10-binary.tar.gz"}
    sources = data._DATASETS.values()
    sums = [md5 for source in sources for md5 in source.md5.values()]
    assert len(set(sums)) == 9 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
    assert all(source.mirror.startswith("http") and source.mirror.endswith("/") for source in sources)


def test_downloads_with_the_right_checksum_are_used_and_kept(tmp_path, mirror):
    mirror.publish("mnist", zipped_mnist(tmp_path / "source"))
    first = data.load_data("mnist", tmp_path / "data")
    mirror.publish("mnist", {}, url="http://127.0.0.1:1/")      # not asked again
    assert torch.equal(first.x, data.load_data("mnist", tmp_path / "data").x)
    kept = sorted(path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*.*"))
    assert kept == sorted(Path("mnist", f"{name}.gz") for name in data._IDX)


@pytest.mark.parametrize("fault, words", [
    ("wrong checksum", "has MD5 [0-9a-f]{32} instead of 0{32}"), ("cut", "IncompleteRead"),
    ("refused", "refused"), ("absent", "404"), ("something else", "has MD5"), ("no room", "File exists")])
def test_a_failed_download_leaves_one_line_and_no_file(tmp_path, mirror, fault, words):
    files = zipped_mnist(tmp_path / "source")
    url = {"url": "http://127.0.0.1:1/"} if fault == "refused" else {}
    mirror.publish("mnist", files, "0" * 32 if fault == "wrong checksum" else None, **url)
    if fault == "cut":
        mirror.cut.update(files)
    elif fault == "absent":
        mirror.files.clear()
    elif fault == "something else":
        mirror.files.update(dict.fromkeys(files, b"something else"))
    elif fault == "no room":
        (tmp_path / "data").write_text("a file where the folder would be")
        words = "exists|Not a directory"
    message = refused(tmp_path, words, data.load_data, "mnist", tmp_path / "data")
    assert "--data-dir" in message and "could not be downloaded" in message


def test_a_hostile_archive_writes_nothing_outside_its_folder_and_is_never_unpickled(tmp_path, mirror):
    secret, record = tmp_path / "secret", bytes([7, *(i % 5 for i in range(3072))])
    secret.write_bytes(record)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    hostile = [("../../evil", b"x"), (str(tmp_path / "absolute"), b"x"),
               ("data_batch_1", pickle.dumps(Evil())),
               link("data_batch_2.bin", str(secret), tarfile.SYMTYPE),
               link("data_batch_3.bin", "../../secret", tarfile.LNKTYPE),
               link("x/test_batch.bin", "/dev/zero", tarfile.CHRTYPE)]
    good = [(f"../cifar/{name}", record) for name in data._CIFAR]       # known by name: kept, in the folder
    mirror.publish("cifar10", {"cifar-10-binary.tar.gz": archive(hostile + good)})
    splits = data.load_data("cifar10", tmp_path / "a" / "b" / "data")
    assert splits.x.shape == (5, 3072) and splits.y.tolist() == [7] * 5
    here = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    assert here == {"secret", *(f"a/b/data/cifar10/{name}" for name in data._CIFAR)}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))

    mirror.publish("cifar10", {"cifar-10-binary.tar.gz": archive(hostile)})
    with pytest.raises(data.InputError, match="data_batch_1.bin"):
        data.load_data("cifar10", tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def test_whole_file_leaves_the_old_content_or_the_new_and_never_a_part(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        with data.whole_file(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"old"
            part, = tmp_path.glob("file.*.part")            # of this process, a name that git ignores
            assert part.name == f"file.{os.getpid()}.part"
        assert path.read_bytes() == content
    with pytest.raises(KeyboardInterrupt), data.whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {path: b"new"}


# ------------------------------------------------------------------------------------------------------
# Text and tokens

def write_bin(path, tokens, shard=False, magic=20240520, version=1, count=None):
    """A .bin file of uint16 tokens: nanoGPT's, or with llm.c's header."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253) if shard else b""
    path.write_bytes(header + np.asarray(tokens, "<u2").tobytes())


def tokens_of(splits):
    """The whole training stream, read as windows of one token."""
    return splits.x.windows(torch.arange(len(splits.x)), 1).flatten().numpy()


def all_windows(stream, length):
    return np.lib.stride_tricks.sliding_window_view(stream, length)


def test_windows_of_a_text_file_are_slices_of_its_bytes_and_its_last_tenth_validates(tmp_path):
    content = np.random.default_rng(0).integers(0, 128, 1003, dtype=np.uint8)
    content.tofile(tmp_path / "text")
    splits = data.load_text(str(tmp_path / "text"), context=8, val_size=7)
    assert splits.outputs == 256 and (tokens_of(splits) == content[:903]).all()
    starts = torch.tensor([[0, 5], [894, 17]])
    windows = splits.x.windows(starts, 9)
    assert windows.dtype == torch.int64
    assert (windows.numpy() == all_windows(content, 9)[starts]).all()
    val_starts = torch.linspace(0, 100 - 9, 7).long()
    val_windows = all_windows(content[903:], 9)     # 92 of the 100 tokens begin one
    assert (splits.x_val.numpy() == val_windows[val_starts, :8]).all() and len(splits.x_val) == 7
    assert (splits.y_val.numpy() == val_windows[val_starts, 1:]).all()
    assert data.load_text(str(tmp_path / "text"), context=8).x_val.shape == (64, 8)
    many = data.load_text(str(tmp_path / "text"), context=8, val_size=500)
    assert (many.x_val.numpy() == val_windows[:, :8]).all() and len(many.x_val) == 92


def test_a_window_needs_one_token_more_than_its_context(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)))      # 90 to train on, 10 to validate
    splits = data.load_text(str(tmp_path / "text"), context=9)
    assert splits.x_val.tolist() == [list(range(90, 99))] and splits.y_val.tolist() == [list(range(91, 100))]
    name = str(tmp_path / "text")
    refused(tmp_path, "10 tokens to validate on; context 10 needs more", data.load_text, name, 10)
    refused(tmp_path, "90 tokens to train on; context 99999999 needs more", data.load_text, name, 99999999)


def test_of_a_folder_of_text_every_tenth_file_validates_and_windows_run_across_files(tmp_path):
    texts = [bytes([65 + i]) * (3 + i) for i in range(21)]
    (tmp_path / "b").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / ("b" if i > 12 else "") / f"{i:02}.txt").write_bytes(text)
    (tmp_path / ".hidden").write_bytes(b"not read")
    (tmp_path / "07.empty").write_bytes(b"")
    splits = data.load_text(str(tmp_path), context=4)
    trained = b"".join(text for i, text in enumerate(texts) if i not in (9, 19))
    stream = np.frombuffer(trained, np.uint8)
    assert (tokens_of(splits) == stream).all() and len(splits.x) == len(stream)
    windows = splits.x.windows(torch.arange(len(stream) - 19), 20).numpy()      # most span several files
    assert (windows == all_windows(stream, 20)).all()
    assert set(splits.x_val.flatten().tolist()) == {65 + 9, 65 + 19}


def test_hidden_files_and_folders_are_not_read_unless_a_hidden_folder_is_named(tmp_path):
    folder = tmp_path / ".checkout"
    for place in (".git/objects", "src/.cache/deep", "src/deep"):
        (folder / place).mkdir(parents=True)
    for i in range(10):
        (folder / "src" / "deep" / f"{i}").write_bytes(bytes([65 + i]) * 9)
    for file in (".git/config", ".git/objects/pack.bin", "src/.cache/deep/x", "src/.x"):
        (folder / file).write_bytes(b"\xff" * 100)
    splits = data.load_text(str(folder), context=4)
    assert bytes(tokens_of(splits).astype(np.uint8)) == b"".join(bytes([65 + i]) * 9 for i in range(9))
    assert set(splits.x_val.flatten().tolist()) == {65 + 9}


def test_stdlib_is_the_bytes_of_pythons_own_sources_in_sorted_order_without_tests(tmp_path, monkeypatch):
    first = Path(sysconfig.get_paths()["stdlib"], "__future__.py").read_bytes()
    splits = data.load_text("stdlib", context=16)
    assert bytes(splits.x.windows(torch.tensor(0), 99).tolist()) == first[:99]
    assert len(splits.x) > 10 ** 6 and splits.outputs == 256 and splits.x_val.shape == (64, 16)

    skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages", "json/tests", ".git")
    for name in ("json", *skipped):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_bytes(b"#" * 100)
    for i in range(19):
        (tmp_path / "json" / f"{i:02}.py").write_bytes(bytes([65 + i]) * 20)
        (tmp_path / "json" / f"{i:02}.txt").write_bytes(b"#" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    splits = data.load_text("stdlib", context=16)       # of json: 00.py to 18.py, then x.py
    names = [Path(array.filename).name for array in splits.x.arrays]
    assert names == [f"{i:02}.py" for i in range(19) if i != 9]
    assert (splits.x_val[0] == 65 + 9).all() and (splits.x_val[-1] == ord("#")).all()


def test_windows_run_across_shards_and_the_vocabulary_is_counted_set_or_refused(tmp_path):
    generator = np.random.default_rng(1)
    shards = [generator.integers(0, 5000, size) for size in (40, 0, 3, 200)]
    for i, tokens in enumerate(shards):
        write_bin(tmp_path / f"fineweb_train_{i:06}.bin", tokens, shard=True)
    write_bin(tmp_path / "fineweb_val_000000.bin", [4999, *range(60)], shard=True)
    (tmp_path / "notes.txt").write_bytes(b"not read beside shards")
    splits, stream = data.load_text(str(tmp_path), context=16), np.concatenate(shards)
    assert splits.outputs == 5000 and (tokens_of(splits) == stream).all()
    windows = splits.x.windows(torch.arange(len(stream) - 16), 17).numpy()
    assert (windows == all_windows(stream, 17)).all()
    assert splits.x_val[0].tolist() == [4999, *range(15)]
    assert data.load_text(str(tmp_path), context=16, vocab_size=50304).outputs == 50304
    with pytest.raises(data.InputError, match="outside the vocabulary of 4999; give --vocab-size, or 0"):
        data.load_text(str(tmp_path), context=16, vocab_size=4999)
    small = data.load_text(str(tmp_path), context=16, vocab_size=5000)
    small.x.vocabulary = int(stream.max())          # a token that only the training files hold
    with pytest.raises(data.InputError, match=f"^token {stream.max()} is outside the vocabulary of "):
        tokens_of(small)


def test_a_nanogpt_bin_file_is_uint16_without_a_header(tmp_path):
    tokens = np.random.default_rng(2).integers(0, 50257, 500)
    write_bin(tmp_path / "train.bin", tokens)
    write_bin(tmp_path / "val.bin", tokens[:50])
    splits = data.load_text(str(tmp_path), context=8)
    assert (tokens_of(splits) == tokens).all() and splits.outputs == tokens.max() + 1
    alone = data.load_text(str(tmp_path / "train.bin"), context=8)
    assert (alone.x.windows(torch.tensor([3]), 8).numpy() == tokens[3:11]).all() and len(alone.x) == 450
    assert alone.x_val[0].tolist() == tokens[450:458].tolist()
    counts = np.bincount(tokens, minlength=splits.outputs) / 500
    assert np.allclose(splits.x.frequencies.numpy(), counts) and splits.frequencies.dtype == torch.float64


@pytest.mark.parametrize("name", ["text", "tokens.bin"])
def test_of_a_file_larger_than_memory_only_the_windows_asked_for_are_read(tmp_path, name):
    kind, start = ("u1", 2 ** 39) if name == "text" else ("<u2", 2 ** 38)
    with open(tmp_path / name, "wb") as file:       # sparse: no room on the disk, but much in memory
        file.truncate(2 ** 40)
        file.seek(2 ** 39)
        file.write(np.arange(64, dtype=kind).tobytes())
    splits = data.load_text(str(tmp_path / name), context=32, vocab_size=256)
    assert (splits.x.windows(torch.tensor([start]), 64).numpy() == np.arange(64)).all()
    assert splits.frequencies.tolist() == [1.0] + [0.0] * 255       # of the first 16M tokens, all zero


def test_frequencies_of_tokens_end_after_16m_tokens_also_across_files(tmp_path):
    sizes = (2 ** 24 - 10, 6, 8, 100)       # 4 of the third file count, none of the fourth
    arrays = []
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * size)
        arrays.append(np.memmap(tmp_path / f"{i}", "u1", "r"))
    counts = data.Tokens(arrays, 5).frequencies * 2 ** 24
    assert counts.tolist() == pytest.approx([2 ** 24 - 10, 6, 4, 0, 0])


def shard(**header):
    def write(folder):
        write_bin(folder / "a_train.bin", range(100), shard=True, **header)
        write_bin(folder / "a_val.bin", range(100), shard=True)
    return write


def text(content, file="a"):
    return lambda folder: (folder / file).write_bytes(content)


def spoiled_shard(change):
    return lambda folder: [shard()(folder), edit("a_train.bin", change)(folder)]


@pytest.mark.parametrize("write, file, vocab_size, words", [
    (text(b""), "a", 0, "0 tokens to train on"),
    (text(b"abc" * 11), "a", 0, "30 tokens to train on; context 32 needs more"),
    (lambda d: None, "", 0, "0 tokens to train on"),
    (text(b"abc" * 1000), "", 0, "0 tokens to validate on; .*every tenth text file validates"),
    (text(bytes(1001), "a.bin"), "a.bin", 0, "holds 1001 bytes; .* has an even number"),
    (text(b"", "a.bin"), "a.bin", 0, "0 tokens to train on"),
    (spoiled_shard(lambda b: b[:-5]), "", 0, "20240520, 1, 100. and 1219 bytes; .* count bytes"),
    (shard(count=90), "", 0, "count bytes"),
    (spoiled_shard(lambda b: b[:100]), "", 0, "count bytes"),
    (spoiled_shard(lambda b: b[:1023]), "", 0, "count bytes"),
    (shard(version=2), "", 0, "count bytes"),
    (shard(magic=20240801), "", 0, "has 20240520, 1, count"),
    (lambda d: [shard()(d), (d / "a_val.bin").unlink()], "", 0, "with val in their names"),
    (lambda d: None, "nowhere", 0, "nowhere' is no file or folder; choose stdlib"),
    (lambda d: None, "n" * 300, 0, "data cannot be read: .*File name too long"),
])
def test_text_without_a_window_and_damaged_tokens_are_named(tmp_path, write, file, vocab_size, words):
    write(tmp_path)
    refused(tmp_path, words, data.load_text, str(tmp_path / file), 32, vocab_size=vocab_size)


@pytest.mark.parametrize("write, file, vocab_size, token", [
    (text(b"abc" * 1000), "a", 99, 99), (lambda d: write_bin(d / "a.bin", range(1000)), "a.bin", 900, 999),
    (lambda d: np.save(d / "a.npy", np.arange(1000) - 30), "a.npy", 0, -30)])
def test_a_token_outside_the_vocabulary_is_named_with_the_remedy(tmp_path, write, file, vocab_size, token):
    write(tmp_path)
    with pytest.raises(data.InputError) as error:
        splits = data.load_text(str(tmp_path / file), 32, vocab_size=vocab_size)
        splits.batch(torch.arange(splits.samples)[None])
    assert str(error.value) == (f"token {token} is outside the vocabulary of {vocab_size or 970}; "
                                "give --vocab-size, or 0 to find it")


# ------------------------------------------------------------------------------------------------------
# Arrays of the user's: FILE.npz and FILE.py:FUNCTION

def table(samples=40, inputs=5, classes=3, seed=0):
    """Arrays x (N, D) of normal numbers, some far from the others, and classes y (N,)."""
    rng = np.random.default_rng(seed)
    return 3 + 2 * rng.standard_normal((samples, inputs)).astype("f4"), np.arange(samples) % classes


def save_npz(path="table.npz", **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)], ids=str)
def test_a_tenth_of_the_arrays_validates_after_a_shuffle_by_data_seed(shape):
    x = 3 + 2 * np.random.default_rng(0).standard_normal((43, *shape)).astype("f4")
    name = save_npz(x=x, y=np.arange(43) % 3)
    for seed in (0, 5):
        splits = data.load_data(name, data_seed=seed)
        order = torch.randperm(43, generator=data.stream(seed, "split"))
        train, val = order[:39], order[39:]
        flat = torch.from_numpy(x.reshape(43, -1))
        mean, std = flat[train].mean(), flat[train].std()
        torch.testing.assert_close(splits.x, (flat[train] - mean) / std)
        torch.testing.assert_close(splits.x_val, (flat[val] - mean) / std)
        assert splits.y.tolist() == (train % 3).tolist() and splits.y_val.tolist() == (val % 3).tolist()
        assert (splits.outputs, splits.shape, splits.samples) == (3, shape, 39) and not splits.is_real_valued
        assert splits.y.dtype == torch.int64 and splits.x.dtype == torch.float32
        index = torch.tensor([[0, 38], [7, 7]])
        assert all(torch.equal(a, b[index]) for a, b in zip(splits.batch(index), splits[:2]))
    assert len(data.load_data(save_npz(x=x[:2], y=np.array([0, 1]))).x_val) == 1


def test_a_validation_split_in_the_file_is_taken_as_it_is_and_scaled_as_the_training_split():
    x, y = table()
    name = save_npz(x=x[:30], y=y[:30], x_val=x[30:], y_val=np.full(10, 7), unused=np.zeros(3))
    splits = data.load_data(name)
    mean, std = x[:30].mean(), x[:30].std(ddof=1)
    assert np.allclose(splits.x.numpy(), (x[:30] - mean) / std, atol=1e-5)
    assert np.allclose(splits.x_val.numpy(), (x[30:] - mean) / std, atol=1e-5)
    assert splits.y.tolist() == y[:30].tolist() and splits.y_val.tolist() == [7] * 10
    assert splits.outputs == 8          # of both splits
    double = data.load({**SETTINGS, "data": name, "dtype": "float64"})
    assert double.x.dtype == double.x_val.dtype == torch.float64 and double.y.dtype == torch.int64


@pytest.mark.parametrize("shape, outputs", [((40,), 1), ((40, 1), 1), ((40, 3), 3)], ids=str)
def test_real_valued_targets_are_left_as_they_are(shape, outputs):
    (x, _), y = table(), 100 + 9 * np.random.default_rng(1).standard_normal(shape)
    splits = data.load_data(save_npz(x=x[:30], y=y[:30], x_val=x[30:], y_val=y[30:]), dtype=torch.float64)
    assert splits.is_real_valued and splits.outputs == outputs
    assert torch.equal(splits.y, torch.from_numpy(y[:30]).view(30, outputs))
    assert torch.equal(splits.y_val, torch.from_numpy(y[30:]).view(10, outputs))
    single = data.load_data(save_npz(x=x, y=y))
    assert single.y.dtype == torch.float32 and single.y.shape == (36, outputs)
    x_batch, y_batch = single.batch(torch.tensor([[0, 5], [3, 3]]))
    assert x_batch.shape == (2, 2, 5) and torch.equal(y_batch, single.y[torch.tensor([[0, 5], [3, 3]])])


WHOLE = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", ">u2", ">i4", ">u8"]


@pytest.mark.parametrize("kind", [*WHOLE, "f2", "f4", "f8", ">f4", ">f8", "?"])
def test_arrays_may_have_any_type_of_number_and_any_byte_order(kind):
    x, y = np.arange(200).reshape(40, 5) % 97 % (2 if kind == "?" else 100), np.arange(40) % 2
    plain = data.load_data(save_npz(x=x, y=y))
    for order in "CF":
        splits = data.load_data(save_npz(x=np.array(x.astype(kind), order=order), y=y))
        torch.testing.assert_close(splits.x, plain.x)
    splits = data.load_data(save_npz(x=x, y=y.astype(kind)))
    if np.dtype(kind).kind == "f":
        assert splits.y.flatten().tolist() == plain.y.tolist() and splits.y.dtype == torch.float32
    else:
        assert splits.y.dtype == torch.int64 and torch.equal(splits.y, plain.y) and splits.outputs == 2


def pickled():
    class Evil:
        def __reduce__(self):
            return open, ("executed", "w")
    return np.array([Evil()] * 40, dtype=object)


X, Y = table()
BAD_ARRAYS = {      # name: (the arrays, what the error says)
    "different lengths": (dict(x=X, y=Y[:10]), "40 samples of x but 10 of y"),
    "different lengths of the validation split": (
        dict(x=X, y=Y, x_val=X, y_val=Y[:9]), "40 samples of x but 9 of y"),
    "nan": (dict(x=np.where(X > 3, np.nan, X), y=Y), "x holds nan or infinite values; remove those samples"),
    "infinite": (dict(x=X, y=Y, x_val=X + np.inf, y_val=Y), "x_val holds nan or infinite values"),
    "nan targets": (dict(x=X, y=np.full(40, np.nan)), "y holds nan or infinite values"),
    "other names": (dict(features=X, labels=Y), "holds arrays features, labels; it must hold x and y, and"),
    "no arrays": ({}, "holds arrays no; it must hold x and y"),
    "no y": (dict(x=X), "holds arrays x; it must hold"),
    "x_val without y_val": (dict(x=X, y=Y, x_val=X), "holds arrays x, y, x_val; it must hold"),
    "negative classes": (dict(x=X, y=Y - 1), "y holds the class -1; classes begin at 0"),
    "negative classes to validate": (dict(x=X, y=Y, x_val=X, y_val=Y - 2), "y holds the class -2"),
    "one class": (dict(x=X, y=0 * Y), "y holds one class only"),
    "classes (N, 1)": (dict(x=X, y=Y[:, None]), r"classes y have shape \(40, 1\); they must be \(N,\)"),
    "targets (N, 1, 1)": (dict(x=X, y=X[:, :1, None]), r"shape \(40, 1, 1\); it must be \(N,\) or \(N, K\)"),
    "other targets to validate": (
        dict(x=X, y=X[:, :1], x_val=X, y_val=X[:, :2]), r"real-valued y has shape \(40, 2\)"),
    "other kinds": (dict(x=X, y=Y, x_val=X, y_val=X[:, 0]), "y and y_val are of different kinds"),
    "x (N,)": (dict(x=X[:, 0], y=Y), r"x has shape \(40,\); it must be \(N, ...\)"),
    "other inputs to validate": (
        dict(x=X, y=Y, x_val=X[:, :3], y_val=Y), r"x has shape \(40, 3\); it must be .* the same in both"),
    "a scalar": (dict(x=X, y=np.array(3)), r"y has shape \(\); it must have samples"),
    "empty": (dict(x=X[:0], y=Y[:0]), r"x has shape \(0, 5\); it must have samples"),
    "one sample": (dict(x=X[:1], y=Y[1:2]), "one sample cannot be split"),
    "constant": (dict(x=0 * X + 3, y=Y), "x of table.npz is constant, so it cannot be scaled to variance 1"),
    "strings": (dict(x=X.astype("U5"), y=Y), "x holds <U5; it must hold numbers"),
    "complex": (dict(x=X, y=X[:, 0] + 1j), "y holds complex64; it must hold numbers"),
    "dates": (dict(x=X, y=Y.astype("M8[s]")), r"y holds datetime64\[s\]; it must hold numbers"),
    "pickled objects": (dict(x=X, y=pickled()), "Python objects .*; save plain arrays with numpy.savez"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_line(tmp_path, name):
    arrays, words = BAD_ARRAYS[name]
    save_npz(**arrays)
    with pytest.raises(data.InputError, match=words) as error:
        data.load_data("table.npz")
    assert "\n" not in str(error.value) and "table.npz" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["table.npz"]       # nothing was executed


def outcome_of(load, *args):
    """Return "read", "one line", or the error that should have been one line."""
    try:
        load(*args)
        return "read"
    except data.InputError as error:
        return "one line" if "\n" not in str(error) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_one_line_wherever_it_is_damaged(save):
    x, y = table(12, 2)
    save("table.npz", x=x, y=y)
    content, rng, outcomes = Path("table.npz").read_bytes(), np.random.default_rng(0), {}
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 + int(rng.integers(255))
        for damaged in (changed, content[:position]):
            Path("damaged.npz").write_bytes(damaged)
            outcomes.setdefault(outcome_of(data.load_data, "damaged.npz"), position)
    assert outcomes.keys() <= {"read", "one line"}, outcomes


def test_damaged_npy_tokens_are_one_line_wherever_they_are_damaged():
    np.save("tokens.npy", np.arange(3000, dtype="u2"))
    content, rng, outcomes = Path("tokens.npy").read_bytes(), np.random.default_rng(0), {}
    for position in range(128):             # the header
        for value in (None, *b"#(\"'\n,0", int(rng.integers(256))):
            changed = content[:position] + (b"" if value is None else bytes([value]) + content[position + 1:])
            Path("damaged.npy").write_bytes(changed)
            outcomes.setdefault(outcome_of(data.load_text, "damaged.npy", 8), position)
    assert outcomes.keys() <= {"read", "one line"}, outcomes


@pytest.mark.parametrize("write, words", [
    (lambda path: None, "data cannot be read: .*No such file"), (lambda path: path.mkdir(), "Is a directory"),
    (lambda path: path.write_bytes(b""), "damaged or holds Python objects"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(range(100))), "damaged or holds Python objects"),
    (lambda path: path.write_text("no archive"), "damaged or holds Python objects"),
    (lambda path: path.write_bytes(pickle.dumps([1])), "damaged or holds Python objects")])
def test_what_is_no_npz_is_one_line(tmp_path, write, words):
    write(tmp_path / "table.npz")
    refused(tmp_path, words, data.load_data, str(tmp_path / "table.npz"))


FUNCTIONS = """
import numpy, torch
from beside import SAMPLES

def images():
    x = 5 + torch.arange(SAMPLES * 48.0).view(SAMPLES, 3, 4, 4)
    return x.requires_grad_(), torch.arange(SAMPLES) % 2

def with_validation():
    x = numpy.arange(60.0).reshape(20, 3)
    return [x, x[:, 0], x[:4], x[:4, 0]]

def lists():
    return [[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], (0, 1, 1)

def half():
    return torch.linspace(-1, 1, 60).view(20, 3).half(), torch.arange(20) % 2

def three():
    return 1, 2, 3

def dictionary():
    return {"x": 1, "y": 2}

def ragged():
    return [[1.0, 2.0], [3.0]], [0, 1]

def bfloat16():
    return torch.linspace(-1, 1, 60).view(20, 3).bfloat16(), torch.arange(20) % 2

def sparse():
    return torch.eye(20).to_sparse(), torch.arange(20) % 2

def longdouble():
    return numpy.linspace(-1, 1, 60).reshape(20, 3).astype(numpy.longdouble), numpy.arange(20) % 2

def value_error():
    raise ValueError("the author's own")

def os_error():
    open("/nowhere/file")

CONSTANT = 3
"""


@pytest.fixture
def functions(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(FUNCTIONS)
    (folder / "beside.py").write_text("SAMPLES = 20\n")
    yield f"{folder}/mine.py"
    sys.modules.pop("beside", None)


def test_a_functions_arrays_are_used_as_it_returns_them(functions):
    before = list(sys.path)
    splits = data.load_data(f"{functions}:images")
    order = torch.randperm(20, generator=data.stream(0, "split"))
    x = 5 + torch.arange(20 * 48.0).view(20, 48)
    assert torch.equal(splits.x, x[order[:18]]) and torch.equal(splits.x_val, x[order[18:]])
    assert not splits.x.requires_grad and splits.shape == (3, 4, 4) and splits.outputs == 2
    splits = data.load_data(f"{functions}:with_validation", dtype=torch.float64)
    x = torch.arange(60.0, dtype=torch.float64).view(20, 3)
    for a, b in zip(splits[:4], (x, x[:, :1], x[:4], x[:4, :1])):
        assert torch.equal(a, b)
    assert splits.is_real_valued and splits.outputs == 1
    assert len(data.load_data(f"{functions}:lists").x) == 2
    half = data.load_data(f"{functions}:half")
    assert half.x.dtype == torch.float32 and half.x.abs().max() <= 1
    assert sys.path == before


@pytest.mark.parametrize("function, words", [
    ("three", r"mine.py:three returned a tuple; it must return \(x, y\) or \(x, y, x_val, y_val\)"),
    ("dictionary", "returned a dict; it must return"), ("nothing", "mine.py has no function 'nothing'"),
    ("CONSTANT", "mine.py has no function 'CONSTANT'"), ("ragged", "mine.py:ragged")])
def test_a_function_that_returns_no_arrays_is_one_line(functions, function, words):
    before = list(sys.path)
    refused(Path(functions).parent, words, data.load_data, f"{functions}:{function}")
    assert sys.path == before


@pytest.mark.parametrize("function", ["bfloat16", "sparse", "longdouble"])
def test_arrays_that_numpy_or_torch_do_not_know_are_read_or_refused_in_one_line(functions, function):
    assert outcome_of(data.load_data, f"{functions}:{function}") in ("read", "one line")


def test_the_errors_of_a_function_keep_their_traceback(functions):
    with pytest.raises(ValueError, match="^the author's own$") as error:
        data.load_data(f"{functions}:value_error")
    assert "mine.py" in str(error.traceback[-1].path) and not isinstance(error.value, data.InputError)
    with pytest.raises(RuntimeError, match="os_error raised an error") as error:
        data.load_data(f"{functions}:os_error")
    assert isinstance(error.value.__cause__, FileNotFoundError)
    Path(functions).write_text("def broken(:\n")
    with pytest.raises(SyntaxError):
        data.load_data(f"{functions}:broken")
    with pytest.raises(data.InputError, match="nowhere.py is no file; give FILE.py:FUNCTION"):
        data.load_data("nowhere.py:load")


def test_a_functions_file_may_define_dataclasses(tmp_path):
    (tmp_path / "mine.py").write_text("""
from __future__ import annotations
import dataclasses, numpy

@dataclasses.dataclass
class Sizes:
    samples: int = 20

def load():
    return numpy.arange(Sizes().samples * 3.0).reshape(-1, 3), numpy.arange(Sizes().samples) % 2
""")
    assert len(data.load_data("mine.py:load").x) == 18


def test_names_of_data_say_what_they_are():
    for name in ("multi_index", "mnist", "fashion_mnist", "cifar10", "a.npz", "a.py:load", "d/a.npz"):
        assert not data.is_text(name)
    for name in ("stdlib", "a.txt", "a.py", "a.npy", "a.bin", "folder"):
        assert data.is_text(name)


def test_one_line_says_what_was_read(functions):
    line = "data: 18 samples (3, 4, 4), 2 classes; 2 to validate"
    assert data.load_data(f"{functions}:images").describe() == line
    line = "data: 20 samples (3,), 1 targets; 4 to validate"
    assert data.load_data(f"{functions}:with_validation").describe() == line
    line = "data: 20,000 samples (100,), 2 classes; 1,000 to validate"
    assert data.load_data("multi_index").describe() == line
    np.save("tokens.npy", np.arange(3000))
    line = "data: 2,700 tokens of a vocabulary of 3,000; 64 windows of 8 to validate"
    assert data.load_text("tokens.npy", context=8).describe() == line


# ------------------------------------------------------------------------------------------------------
# Digests, streams, and writing files

def test_a_digest_is_that_of_the_arrays_content_type_and_shape(functions):
    def digest(path="table.npz", **arrays):
        return data.load_data(save_npz(path, **arrays)).digest

    x, y = table()
    plain = digest(x=x, y=y)
    assert re.fullmatch("[0-9a-f]{16}", plain) and plain == digest("other.npz", x=x, y=y)
    moved, swapped = x.copy(), y.copy()
    moved[7, 3] = np.nextafter(moved[7, 3], np.float32(np.inf))
    swapped[[3, 4]] = swapped[[4, 3]]
    changes = [dict(x=moved, y=y), dict(x=x, y=swapped), dict(x=x, y=y, x_val=x, y_val=y),
               dict(x=x.astype("f8"), y=y), dict(x=x.reshape(40, 5, 1), y=y), dict(x=x, y=y.astype("f4"))]
    assert len({plain, *(digest(**arrays) for arrays in changes)}) == 7
    assert plain == data.load_data("other.npz", data_seed=3, dtype=torch.float64).digest
    assert data.load_data("multi_index").digest == ""
    first = data.load_data(f"{functions}:images").digest
    Path(functions).write_text(FUNCTIONS.replace("5 + ", "6 + "))
    assert data.load_data(f"{functions}:images").digest != first


def test_a_digest_of_images_counts_the_test_images_that_do_not_validate(tmp_path):
    images, test_images = write_mnist(tmp_path)
    first = data.load_data("mnist", tmp_path, val_size=3).digest
    assert first == data.load_data("mnist", tmp_path, val_size=7).digest
    edit(data._IDX[2], lambda content: content[:-1] + bytes([content[-1] ^ 1]))(tmp_path)
    assert data.load_data("mnist", tmp_path, val_size=3).digest != first


def test_a_digest_of_text_is_that_of_its_bytes_whatever_the_windows(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"ab " * 1000)
    first = data.load_text(str(path), 8)
    assert re.fullmatch("[0-9a-f]{16}", first.digest)
    assert first.digest == data.load_text(str(path), 16, vocab_size=999, val_size=3).digest
    digests = {first.digest}
    for content in (b"cd " * 1000, b"ab " * 999 + b"ab.", b"ab " * 1001, b"ab. " + b"ab " * 998 + b"ab"):
        path.write_bytes(content)
        digests.add(data.load_text(str(path), 8).digest)
    assert len(digests) == 5


def test_a_digest_of_a_folder_is_that_of_all_its_files(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}").write_bytes(b"ab " * 20)
    digests = {data.load_text(str(tmp_path), 8).digest}
    for i in (0, 9, 19):            # two of them validate
        (tmp_path / f"{i:02}").write_bytes(b"ab " * 19 + b"abc")
        digests.add(data.load_text(str(tmp_path), 8).digest)
    assert len(digests) == 4


MIB = 2 ** 20


@pytest.mark.parametrize("size", [64 * MIB, 64 * MIB + 1, 300 * MIB])
def test_a_digest_of_a_large_file_is_that_of_its_size_and_of_blocks_from_head_to_tail(tmp_path, size):
    """Files of zeros, sparse on the disk. Up to 64 MiB every byte counts, beyond 18 blocks of 1 MiB."""
    def digest():
        return data._digest_of_file(np.memmap(path, "u1", "r"))

    def flip(position):
        with open(path, "r+b") as file:
            file.seek(position)
            value = file.read(1)[0]
            file.seek(position)
            file.write(bytes([value ^ 1]))

    path = tmp_path / "text"
    with open(path, "wb") as file:
        file.truncate(size)
    first, changed = digest(), set()
    if size <= 64 * MIB:
        positions = range(0, size, 13 * MIB - 1)
    else:
        positions = [begin + offset for begin in [int(i * (size - MIB) / 17) for i in range(18)]
                     for offset in (0, MIB - 1)]
    for position in [*positions, size - 1]:
        flip(position)
        changed.add(digest())
        flip(position)
    assert first == digest() and first not in changed and len(changed) == len({*positions, size - 1})
    with open(path, "ab") as file:
        file.write(b"\0")           # an insertion changes the size
    assert digest() != first


def test_streams_of_seeds_and_purposes_never_coincide():
    purposes, draws = ("samples", "split", "weights", "batches"), set()
    for seed in range(500):
        for purpose in purposes:
            stream = data.stream(seed, purpose)
            draw = torch.rand(4, generator=stream)
            assert torch.equal(draw, torch.rand(4, generator=data.stream(seed, purpose)))
            draws.add(tuple(draw.tolist()))
    assert len(draws) == 500 * len(purposes)
    seeds = {data.stream_seed(seed, purpose) for seed in range(20_000) for purpose in purposes}
    assert len(seeds) == 80_000 and 0 <= min(seeds) and max(seeds) < 2 ** 63
    for pair in itertools.combinations(purposes, 2):
        a, b = (torch.rand(10_000, generator=data.stream(3, purpose)) for purpose in pair)
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.04            # four standard deviations


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    value = {"a": [1.5, math.nan, {"b": (-math.inf, math.inf, 2)}], "c": True, "d": None, "e": "nan",
             "f": np.float64("inf")}
    expected = {"a": [1.5, None, {"b": [None, None, 2]}], "c": True, "d": None, "e": "nan", "f": None}
    assert data.null_if_not_finite(value) == expected
    assert data.null_if_not_finite(math.inf) is None and data.null_if_not_finite(0.0) == 0.0
    assert math.isnan(value["a"][1])            # the value itself stays


def test_json_is_strict_and_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    data.write_json(file, {"a": [1.5, math.nan, {"b": [-math.inf, math.inf]}]})
    before = file.read_text()
    assert json.loads(before, parse_constant=pytest.fail) == {"a": [1.5, None, {"b": [None, None]}]}
    assert before.endswith("}\n")
    with pytest.raises(TypeError, match="not JSON serializable"):
        data.write_json(file, {"a": object()})
    assert contents(tmp_path) == {file: before.encode()}

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        data.write_json(file, {})
    assert contents(tmp_path) == {file: before.encode()}


# ------------------------------------------------------------------------------------------------------
# Text and tokens of any type; what is neither

@pytest.mark.parametrize("kind", WHOLE)
def test_npy_tokens_may_have_any_whole_type(kind):
    largest = min(70_000, np.iinfo(kind).max)
    tokens = np.random.default_rng(0).integers(0, largest + 1, 2000).astype(kind)
    tokens[1234] = largest
    np.save("tokens.npy", tokens)
    splits = data.load_text("tokens.npy", context=8)
    assert splits.outputs == (256 if kind == "u1" else largest + 1)
    windows, expected = splits.x.windows(torch.arange(1800 - 8), 9), all_windows(tokens.astype("i8"), 9)
    assert windows.dtype == torch.int64 and (windows.numpy() == expected[:1792]).all()
    assert splits.x_val[0].tolist() == tokens[1800:1808].tolist()
    counts = np.bincount(tokens[:1800].astype("i8"), minlength=splits.outputs) / 1800
    assert np.allclose(splits.frequencies.numpy(), counts)
    assert isinstance(splits.x.arrays[0], np.memmap)


def test_the_largest_token_is_looked_for_in_the_whole_file():
    for position in (0, 2 ** 22, 2 ** 22 + 99):
        tokens = np.zeros(2 ** 22 + 100, "u4")
        tokens[position] = 99_999
        np.save("tokens.npy", tokens)
        assert data.load_text("tokens.npy", context=8).outputs == 100_000


def test_npy_shards_of_a_folder_are_one_stream(tmp_path):
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 500, size).astype(kind) for size, kind in ((70, "u2"), (3, "i8"), (200, ">u4"))]
    for i, shard_of in enumerate(shards):
        np.save(tmp_path / f"train_{i}.npy", shard_of)
    np.save(tmp_path / "val_0.npy", np.arange(60))
    splits = data.load_text(str(tmp_path), context=16)
    stream = np.concatenate([tokens.astype("i8") for tokens in shards])
    assert (tokens_of(splits) == stream).all()
    assert (splits.x.windows(torch.arange(257), 17).numpy() == all_windows(stream, 17)).all()


@pytest.mark.parametrize("array, words", [
    (np.arange(1000.0), r"holds float64 of shape \(1000,\); tokens are whole numbers of shape \(N,\)"),
    (np.arange(1000).reshape(10, 100), r"holds int64 of shape \(10, 100\)"),
    (np.array(3), r"holds int64 of shape \(\)"), (np.ones(1000, bool), "holds bool"),
    (np.arange(1000).astype("U4"), "holds <U4"), (pickled(), "damaged or holds no tokens"),
    (np.arange(0), "tokens to train on|damaged")])
def test_npy_files_of_other_than_tokens_are_named(tmp_path, array, words):
    np.save(tmp_path / "tokens.npy", array, allow_pickle=True)
    refused(tmp_path, words, data.load_text, str(tmp_path / "tokens.npy"), 8)
    assert not Path("executed").exists()


@pytest.mark.parametrize("outside", [5, -1])
def test_frequencies_of_tokens_outside_the_vocabulary_are_those_of_the_others_or_one_line(outside):
    tokens = data.Tokens([np.array([2, outside, 2, 1])], 4)
    if outcome_of(lambda: tokens.frequencies) != "one line":
        assert tokens.frequencies.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])


def test_a_bin_of_wider_tokens_is_refused_with_the_conversion(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50_000, 5000)
    for kind in ("<u4", "<i4"):
        tokens.astype(kind).tofile(tmp_path / "tokens.bin")
        message = refused(tmp_path, "every other uint16 of .* is zero, as if its tokens were wider",
                          data.load_text, str(tmp_path / "tokens.bin"), 8)
        assert message.endswith("numpy.save('tokens.npy', numpy.fromfile('tokens.bin', numpy.uint32))")
    exec(f"import numpy; {message.partition('convert them: ')[2]}")
    assert (tokens_of(data.load_text("tokens.npy", 8)) == tokens[:4500]).all()
    for plain in (tokens, np.zeros(5000), np.arange(5000) % 2, np.arange(5000) % 3):
        write_bin(tmp_path / "tokens.bin", plain)
        assert (tokens_of(data.load_text(str(tmp_path / "tokens.bin"), 8)) == plain[:4500]).all()


def write_torch(path):
    torch.save({"weight": torch.ones(50, 50)}, path)


def write_npz(path):
    with path.open("wb") as file:
        np.savez(file, x=np.arange(900))


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(gzip.compress(b"abc " * 9000)), write_npz, write_torch,
    lambda path: path.write_bytes(pickle.dumps(["abc"] * 900)),
    lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999))], ids=["gz", "npz", "pt", "pkl", "png"])
def test_files_of_other_formats_are_refused_as_text_wherever_they_lie(tmp_path, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}").write_bytes(b"abc " * 100)
    for path, name in ((tmp_path / "corpus.txt", "corpus.txt"), (folder / "13", "folder")):
        write(path)
        refused(tmp_path, f"{re.escape(path.name)} is not UTF-8 text .*; convert it, or give tokens as .npy",
                data.load_text, str(tmp_path / name), 8)


def test_text_is_utf_8(tmp_path):
    path = tmp_path / "corpus.txt"
    for content in ("aé" * 1000, "\ufeffab" * 1000, "𝔸b\0\x1b" * 1000):
        path.write_text(content, encoding="utf-8")
        assert bytes(tokens_of(data.load_text(str(path), 8)).astype("u1")).startswith(content.encode()[:1000])
    for shift in range(5):              # wherever the part that is looked at ends
        path.write_bytes(b"a" * (2 ** 16 - shift) + "𝔸".encode() * 9)
        assert data.load_text(str(path), 8).outputs == 256
    for content, reason in (("é" * 1000, "byte 0: "), ("a" * 300 + "é" * 1000, "byte 300: ")):
        path.write_bytes(content.encode("latin-1"))
        message = refused(tmp_path, f"is not UTF-8 text .{reason}", data.load_text, str(path), 8)
        assert message.endswith("convert it, or give tokens as .npy or .bin")
    path.write_text("ab" * 1000, encoding="utf-16")
    refused(tmp_path, "is not UTF-8 text .byte 0", data.load_text, str(path), 8)


# ------------------------------------------------------------------------------------------------------
# A user's data through sweep.py

def sweep_of(name, *flags, out="out"):
    """Return (exit code, standard error, rows) of sweep.py on these data."""
    done = call(lambda: config.command_line(sweep.main), "sweep.py", "--data", name, "--widths", 16, 32,
                "--base-width", 16, "--steps", 200, "--seeds", 2, "--lrs", 0.05, 0.2, "--no-plots",
                "--out", out, *flags)
    rows = Path(out, "runs.jsonl")
    return done.returncode, done.stderr, [*map(json.loads, rows.open())] if rows.exists() else []


ON_TOKENS = ("--model", "gpt", "--layers", 1, "--head-dim", 16, "--context", 16, "--batch-size", 4,
             "--val-size", 8, "--steps", 3, "--warmup", 1, "--seeds", 1, "--lrs", 0.05, "--loss", "ce")


def share_of_chance(rows):
    """Return {loss: the best loss as a share of a constant predictor's}."""
    return {loss: min((row["final_train_loss"] or math.inf) / row["chance_loss"] for row in rows
                      if row["loss"] == loss) for loss in {row["loss"] for row in rows}}


def tabular(samples=3000):
    x = np.random.default_rng(0).standard_normal((samples, 40)).astype("f4")
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.int64)


def test_networks_learn_a_table_with_and_without_a_validation_split():
    x, y = tabular()
    save_npz("without.npz", x=x, y=y)
    save_npz("with.npz", x=x[:2000], y=y[:2000], x_val=x[2000:], y_val=y[2000:])
    for name in ("without.npz", "with.npz"):
        code, err, rows = sweep_of(name, out=name.removesuffix(".npz"))
        assert code == 0 and len(rows) == 8 * len({row["loss"] for row in rows}), err
        assert max(share_of_chance(rows).values()) < 0.9


IMAGES_OF_NOISE = """import numpy as np
def load():
    x = np.random.default_rng(1).standard_normal((2000, 3, 8, 8)).astype("float32")
    return x, (x[:, 0].mean((1, 2)) > 0).astype("int64")
"""
CNN = """import torch.nn as nn
def build(width):
    return nn.Sequential(nn.Unflatten(1, (3, 8, 8)), nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, width), nn.ReLU(),
                         nn.Linear(width, 2))
"""


@pytest.mark.parametrize("flags", [(), ("--model", "cnn.py:build", "--loss", "ce")], ids=["MLP", "CNN"])
def test_networks_train_on_what_a_function_returns(flags):
    Path("mine.py").write_text(IMAGES_OF_NOISE)
    Path("cnn.py").write_text(CNN)
    code, err, rows = sweep_of("mine.py:load", *flags)
    assert code == 0 and len(rows) == 8 * len({row["loss"] for row in rows}), err
    assert max(share_of_chance(rows).values()) < 1


def test_real_valued_targets_train_under_mse_and_huber_and_no_other_loss():
    x, _ = tabular()
    save_npz("table.npz", x=x, y=x[:, :1] * x[:, 1:2] + x[:, 2:3])
    code, err, rows = sweep_of("table.npz", "--loss", "mse", "huber")
    shares = share_of_chance(rows)
    assert code == 0 and shares.keys() == {"mse", "huber"} and max(shares.values()) < 0.95, err
    for loss in ("ce", "brier", "hinge"):
        code, err, rows = sweep_of("table.npz", "--loss", loss, out=loss)
        assert code == 2 and "must be mse or huber, since the targets are real-valued" in err and not rows


def test_tokens_of_uint32_with_a_vocabulary_above_65536_train():
    tokens = np.random.default_rng(0).integers(0, 70_000, 60_000).astype(np.uint32)
    tokens[::2] = 7
    np.save("tokens.npy", tokens)
    code, err, rows = sweep_of("tokens.npy", *ON_TOKENS, "--widths", 16)
    # half of the tokens are one, the others nearly even
    counts = np.bincount(tokens[:54_000]) / 54_000
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    assert code == 0 and 5 < entropy < 7, err
    for row in rows:
        assert row["chance_loss"] == pytest.approx(entropy, rel=1e-6)
        assert row["vocab_size"] == tokens.max() + 1 and row["final_train_loss"] > 0


@pytest.mark.parametrize("name, content", [
    ("u32.bin", np.random.default_rng(0).integers(0, 70_000, 6000).astype(np.uint32).tobytes()),
    ("picture.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 200),
    ("text.gz", b"\x1f\x8b" + bytes(range(256)) * 200)])
def test_files_that_are_no_text_or_tokens_end_with_one_line(name, content):
    Path(name).write_bytes(content)
    code, err, rows = sweep_of(name, *ON_TOKENS)
    assert code == 2 and err.count("\n") == 1 and name in err and "Traceback" not in err and not rows


@pytest.mark.parametrize("name", [
    "different lengths", "nan", "other names", "negative classes", "pickled objects"])
def test_bad_arrays_end_with_one_line(name):
    arrays, words = BAD_ARRAYS[name]
    save_npz(**arrays)
    code, err, rows = sweep_of("table.npz")
    assert code == 2 and err.count("\n") == 1 and re.search(words, err) and not rows


def test_a_damaged_npz_ends_with_one_line():
    Path("table.npz").write_bytes(b"PK\x03\x04" + bytes(range(100)))
    code, err, rows = sweep_of("table.npz")
    assert code == 2 and err.count("\n") == 1 and "table.npz is damaged" in err and not rows


def test_another_content_under_the_same_name_does_not_mix_with_old_rows():
    x, y = tabular(300)
    save_npz("table.npz", x=x, y=y)
    assert sweep_of("table.npz", "--steps", 3)[0] == 0
    before = contents(Path("out"))
    save_npz("table.npz", x=x, y=1 - y)
    code, err, _ = sweep_of("table.npz", "--steps", 3)
    words = "sweep.py: {} holds runs with another content of {}; use another --out"
    assert code == 2 and err.splitlines()[-1] == words.format("out", "table.npz")
    assert "Traceback" not in err and contents(Path("out")) == before
    Path("corpus.txt").write_text("ab " * 20_000)
    assert sweep_of("corpus.txt", *ON_TOKENS, out="text")[0] == 0
    before = contents(Path("text"))
    Path("corpus.txt").write_text("cd " * 20_000)
    code, err, _ = sweep_of("corpus.txt", *ON_TOKENS, out="text")
    assert code == 2 and err.splitlines()[-1] == words.format("text", "corpus.txt")
    assert "Traceback" not in err and contents(Path("text")) == before

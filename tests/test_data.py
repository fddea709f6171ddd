"""Claims about data.py: generated samples, image files and their downloads, text, tokens and windows."""
import ast
import gzip
import hashlib
import http.server
import io
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

import data

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
    generator = torch.Generator().manual_seed(7)
    x, x_val = (torch.randn(size, 100, generator=generator) for size in (20_000, 1_000))
    assert torch.equal(splits.x, x) and torch.equal(splits.x_val, x_val) and splits.classes == 2
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
    assert text.x_val.shape == (2, 8) and text.classes == 120 and text.y is None
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
    lonely = splits._replace(y=torch.zeros(50, dtype=torch.int64), classes=3)
    assert lonely.frequencies.tolist() == [1, 0, 0]


def test_batches_of_text_are_windows_and_the_tokens_after_each(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
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


def black(size, side=28):
    return np.zeros((size, side, side), np.uint8)


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
    assert splits.x.shape == (30, 784) and splits.x_val.shape == (7, 784) and splits.classes == 10
    assert splits.y.tolist() == [i % 10 for i in range(30)] and splits.y_val.tolist() == list(range(7))
    assert abs(splits.x.mean().item()) < 1e-5 and splits.x.std().item() == pytest.approx(1, abs=1e-4)
    for x, raw in ((splits.x, pixels), (splits.x_val, test_pixels[:7])):
        expected = (raw.reshape(len(raw), -1) - pixels.mean()) / pixels.std(ddof=1)
        assert np.allclose(x.numpy(), expected, atol=1e-5)


def test_a_plain_file_is_read_before_a_gzipped_one(tmp_path):
    write_mnist(tmp_path, zipped=True)
    write_mnist(tmp_path, black(10), constant(10, 4))
    assert set(data.load_data("mnist", tmp_path).y.tolist()) == {4}


def test_cifar_records_are_a_label_and_3072_bytes(tmp_path):
    records = np.zeros((4, 3073), dtype=np.uint8)
    records[:, 0], records[:, 1] = [3, 1, 4, 1], 255
    for i, name in enumerate(data._CIFAR):
        records[:, 2] = 40 * i
        (tmp_path / name).write_bytes(records.tobytes())
    splits = data.load_data("cifar10", tmp_path)
    assert splits.x.shape == (20, 3072) and splits.y.tolist() == [3, 1, 4, 1] * 5 and splits.classes == 10
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
    source = data._SOURCES["fashion_mnist"]
    assert source.packaged == (str(FASHION),)
    with monkeypatch.context() as patch:
        patch.setitem(data._SOURCES, "fashion_mnist", source._replace(packaged=("nowhere",)))
        with pytest.raises(data.InputError, match="or install Debian's package dataset-fashion-mnist$"):
            data.load_data("fashion_mnist")
    with pytest.raises(data.InputError, match="or name their folder with --data-dir$"):
        data.load_data("mnist")
    monkeypatch.setitem(data._SOURCES, "fashion_mnist", source._replace(packaged=("packaged",)))
    for place, label in (("packaged", 1), ("data", 2), ("data/fashion_mnist", 3)):
        write_mnist(Path(place), black(10), constant(10, label))
        assert set(data.load_data("fashion_mnist").y.tolist()) == {label}
    with pytest.raises(data.InputError, match="not here"):      # a folder that was named is the only one
        data.load_data("fashion_mnist", "another")


FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9, 4, 0, 9, 1, 1, 2, 4, 3, 2, 7, 3, 8],
    "fashion_mnist": [
        9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 0, 6, 4, 3, 1, 4, 8, 4, 3, 0, 2, 4, 4, 5, 3]}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("asked, found", [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")])
def test_mnist_and_fashion_mnist_are_told_apart_though_their_files_have_the_same_names(
        tmp_path, asked, found, zipped):
    labels = np.array([*FIRST_LABELS[found], 8, 8], np.uint8)
    images = black(34)
    write_mnist(tmp_path, images, labels, zipped)
    message = refused(tmp_path, f"holds {found}, whose files have", data.load_data, asked, tmp_path)
    assert f"put those of {asked} into {tmp_path / asked}, or choose data {found}" in message
    splits = data.load_data(found, tmp_path)
    assert splits.y.tolist() == labels.tolist() and splits.classes == 10
    write_mnist(tmp_path / asked, images, labels)       # a folder of the set's own name is trusted
    assert data.load_data(asked, tmp_path).y.tolist() == labels.tolist()
    labels[31] += 1
    write_mnist(tmp_path / "others", images, labels, zipped)
    assert data.load_data(asked, tmp_path / "others").y.tolist() == labels.tolist()


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
    (lambda d: write_mnist(d, black(0), constant(0, 0)), "holds 0 images"),
    (lambda d: write_mnist(d, black(9), constant(9, 10)),
     "784 values and labels up to 10; mnist has 784 values and classes 0 to 9"),
    (lambda d: write_mnist(d, black(9, 8), constant(9, 0)),
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
            source = data._SOURCES[name]._replace(mirror=url, md5=sums, packaged=())
            monkeypatch.setitem(data._SOURCES, name, source)
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
        assert data._SOURCES[name].md5.keys() == {f"{file}.gz" for file in data._IDX}
        assert data._SOURCES[name].files == data._IDX
    assert data._SOURCES["cifar10"].md5.keys() == {"cifar-10-binary.tar.gz"}
    sources = data._SOURCES.values()
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
    secret, record = tmp_path / "secret", np.full(3073, 7, np.uint8).tobytes()
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
            assert (tmp_path / "file.part").exists()        # a name that git ignores
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
    content = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    content.tofile(tmp_path / "text")
    splits = data.load_text(str(tmp_path / "text"), context=8, val_size=7)
    assert splits.classes == 256 and (tokens_of(splits) == content[:903]).all()
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
    assert len(splits.x) > 10 ** 6 and splits.classes == 256 and splits.x_val.shape == (64, 16)

    skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages", "json/tests", ".git")
    for name in ("json", *skipped):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_bytes(b"#" * 100)
    for i in range(19):
        (tmp_path / "json" / f"{i:02}.py").write_bytes(bytes([65 + i]) * 20)
        (tmp_path / "json" / f"{i:02}.txt").write_bytes(b"#" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    splits = data.load_text("stdlib", context=16)       # of json: 00.py to 18.py, then x.py
    assert [piece.path.name for piece in splits.x.pieces] == [f"{i:02}.py" for i in range(19) if i != 9]
    assert (splits.x_val[0] == 65 + 9).all() and (splits.x_val[-1] == ord("#")).all()


def test_windows_run_across_shards_and_the_vocabulary_is_found_given_or_refused(tmp_path):
    generator = np.random.default_rng(1)
    shards = [generator.integers(0, 5000, size) for size in (40, 0, 3, 200)]
    for i, tokens in enumerate(shards):
        write_bin(tmp_path / f"fineweb_train_{i:06}.bin", tokens, shard=True)
    write_bin(tmp_path / "fineweb_val_000000.bin", [4999, *range(60)], shard=True)
    (tmp_path / "notes.txt").write_bytes(b"not read beside shards")
    splits, stream = data.load_text(str(tmp_path), context=16), np.concatenate(shards)
    assert splits.classes == 5000 and (tokens_of(splits) == stream).all()
    windows = splits.x.windows(torch.arange(len(stream) - 16), 17).numpy()
    assert (windows == all_windows(stream, 17)).all()
    assert splits.x_val[0].tolist() == [4999, *range(15)]
    assert data.load_text(str(tmp_path), context=16, vocab_size=50304).classes == 50304
    with pytest.raises(data.InputError, match="outside the vocabulary of 4999; give --vocab-size, or 0"):
        data.load_text(str(tmp_path), context=16, vocab_size=4999)
    small = data.load_text(str(tmp_path), context=16, vocab_size=5000)
    small.x.vocabulary = int(stream.max())          # a token that only the training files hold
    with pytest.raises(data.InputError, match=f"token {stream.max()} in .*fineweb_train"):
        tokens_of(small)


def test_a_nanogpt_bin_file_is_uint16_without_a_header(tmp_path):
    tokens = np.random.default_rng(2).integers(0, 50257, 500)
    write_bin(tmp_path / "train.bin", tokens)
    write_bin(tmp_path / "val.bin", tokens[:50])
    splits = data.load_text(str(tmp_path), context=8)
    assert (tokens_of(splits) == tokens).all() and splits.classes == tokens.max() + 1
    alone = data.load_text(str(tmp_path / "train.bin"), context=8)
    assert (alone.x.windows(torch.tensor([3]), 8).numpy() == tokens[3:11]).all() and len(alone.x) == 450
    assert alone.x_val[0].tolist() == tokens[450:458].tolist()
    counts = np.bincount(tokens, minlength=splits.classes) / 500
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
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * size)
    pieces = [data.Piece(tmp_path / f"{i}", "u1", 0, size) for i, size in enumerate(sizes)]
    counts = data.Tokens(pieces, 5).frequencies * 2 ** 24
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
    (text(b"abc" * 1000), "a", 99, "token 99 in .*/a or .* outside the vocabulary of 99"),
    (text(bytes(1001), "a.bin"), "a.bin", 0, "holds 1001 bytes; .* has an even number"),
    (text(b"", "a.bin"), "a.bin", 0, "0 tokens to train on"),
    (lambda d: write_bin(d / "a.bin", range(1000)), "a.bin", 900, "outside the vocabulary of 900"),
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


def test_a_text_that_is_gone_when_its_windows_are_read_is_named(tmp_path):
    (tmp_path / "text").write_bytes(bytes(1000))
    splits = data.load_text(str(tmp_path / "text"), context=8)
    (tmp_path / "text").unlink()
    refused(tmp_path, "cannot be read: .*No such file", splits.batch, torch.tensor([[0]]))

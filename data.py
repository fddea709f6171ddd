"""The data of a run: generated samples, image files, text and tokens -> Splits.

    N samples   D input dimension   C classes, or tokens of the vocabulary
    V validation samples   R replicas   B batch size
    T context: tokens of a window

    splits = load_data("multi_index")               # generated: x (N, D), y (N,)
    splits = load_data("fashion_mnist", "data")     # standard files, downloaded where absent
    splits = load_text("stdlib", context=32)        # next-token prediction, memory-mapped
    x, y = splits.batch(torch.randint(splits.samples, (R, B)))

Needs torch and numpy. Never unpickles. Out of scope: data augmentation, tokenizers.
"""
import bisect
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import math
import os
import sysconfig
import tarfile
import urllib.request
import zlib
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SHAPES = {      # (D, C); any other name of data is text
    "multi_index": (100, 2),
    "mnist": (784, 10),
    "fashion_mnist": (784, 10),
    "cifar10": (3072, 10),
}


class InputError(ValueError):
    """Input that a user can mend:
    names the value, what is allowed, and the remedy.
    """


@contextlib.contextmanager
def _readable():
    """A file that the system will not read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"data cannot be read: {error}") from None


class Splits(NamedTuple):
    """Training and validation data on one device;
    of text, x stays in its files.
    """
    x: "torch.Tensor | Tokens"      # (N, D)
    y: "torch.Tensor | None"        # (N,) int64; None for text
    x_val: torch.Tensor             # (V, D); text: (V, T)
    y_val: torch.Tensor             # (V,); text: (V, T), the tokens after
    classes: int

    @property
    def samples(self):
        """N; of text the number of tokens at which a window can begin."""
        return len(self.x) - (self.x_val.shape[-1] if self.y is None else 0)

    @property
    def frequencies(self):
        """Relative frequencies (C,) of the training labels,
        or of the tokens; float64.
        """
        if self.y is None:
            return self.x.frequencies
        return torch.bincount(self.y, minlength=self.classes).double() / len(self.y)

    def batch(self, index):
        """(x, y) of samples index (R, B): rows (R, B, D) and their labels (R, B).

        Of text: windows (R, B, T) that begin at those tokens, and the tokens
        after each. index lies on the data's device, for text on the CPU.
        """
        if self.y is not None:
            # x[index] takes twice as long
            return F.embedding(index, self.x), self.y[index]

        windows = self.x.windows(index, self.x_val.shape[-1] + 1)   # (R, B, T + 1)
        device = self.x_val.device
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[..., :-1], windows[..., 1:]


def load(config, data_dir=None, device="cpu"):
    """Splits of a run's configuration:
    load_data of a name in SHAPES, else load_text.
    """
    name, val_size = config["data"], config["val_size"]
    if name not in SHAPES:
        return load_text(name, config["context"], device, config["vocab_size"], val_size)
    # bfloat16 is autocast's: data stay float32
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    return load_data(name, data_dir, device, dtype,
                     config["train_size"], val_size, config["data_seed"])


@_readable()
def load_data(name, root=None, device="cpu", dtype=torch.float32,
              train_size=20_000, val_size=1_000, data_seed=0):
    """Splits of generated samples or images on the device;
    for text see load_text.

    multi_index: train_size and val_size samples from data_seed. The others:
    standard files (IDX or CIFAR-10 binary, plain or .gz) in root, else
    $DATA_DIR, else ./data, each with or without a folder of the data set's
    name, else where Debian's dataset-fashion-mnist puts them, else downloaded,
    MD5 checked. Pixels are shifted and scaled to the training split's mean 0
    and variance 1; the first val_size test samples validate. InputError:
    unknown name, damaged files, those of another data set, or absent ones that
    cannot be downloaded.
    """
    if name not in SHAPES:
        raise InputError(f"unknown data {name!r}; choose from {', '.join(SHAPES)}")
    if name == "multi_index":
        generator = torch.Generator().manual_seed(data_seed)
        x, y = multi_index(train_size, generator)
        x_val, y_val = multi_index(val_size, generator)
    else:
        x, y, x_val, y_val = (torch.from_numpy(np.array(part))
                              for part in _read_images(name, root))
        x, y = x.float(), y.long()
        x_val, y_val = x_val[:val_size].float(), y_val[:val_size].long()
        mean, std = x.mean(), x.std()
        for images in (x, x_val):
            images.sub_(mean).div_(std)
    return Splits(x.to(device, dtype), y.to(device),
                  x_val.to(device, dtype), y_val.to(device),
                  SHAPES[name][1])


def multi_index(size, generator):
    """x (size, 100) ~ N(0, I), y = [relu(x1) + relu(x2) > relu(x3) + relu(x4)]:
    balanced classes.
    """
    x = torch.randn(size, SHAPES["multi_index"][0], generator=generator)
    z = torch.relu(x[:, :4])
    return x, (z[:, 0] + z[:, 1] > z[:, 2] + z[:, 3]).long()


# ---- image files ----

# files: needed, plain or .gz; md5: {file to download: its MD5};
# packaged: folders of a package
Source = namedtuple("Source", "files mirror md5 packaged")

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)
_IDX_GZ = [f"{file}.gz" for file in _IDX]
_SOURCES = {
    "mnist": Source(
        _IDX, "https://ossci-datasets.s3.amazonaws.com/mnist/",
        dict(zip(_IDX_GZ, (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"))),
        ()),
    "fashion_mnist": Source(
        _IDX, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        dict(zip(_IDX_GZ, (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))),
        ("/usr/share/datasets/fashion-mnist",)),
    "cifar10": Source(
        _CIFAR, "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        ()),
}
# MNIST and Fashion-MNIST name their files alike;
# their first labels tell them apart.
_FIRST_LABELS = {
    "50419213143536172869409112432738": "mnist",
    "90030272550955791064314843024453": "fashion_mnist",
}


def _read_images(name, root):
    """Training images (N, D) and labels (N,), test images and labels, uint8."""
    folder, (values, classes) = _locate(name, root), SHAPES[name]
    if name == "cifar10":
        parts = [*_read_cifar(folder, _CIFAR[:5]), *_read_cifar(folder, _CIFAR[5:])]
    else:
        parts = [_read_idx(folder, file) for file in _IDX]

    for i in (0, 2):
        images, labels = parts[i:i + 2]
        if len(images) != len(labels) or len(labels) == 0:
            raise InputError(f"{folder} holds {len(images)} images "
                             f"but {len(labels)} labels")
        if images[0].size != values or labels.max() >= classes:
            raise InputError(f"{folder} holds images of {images[0].size} values "
                             f"and labels up to {labels.max()}; "
                             f"{name} has {values} values and classes 0 to {classes - 1}")
        parts[i] = images.reshape(-1, values)

    found = _FIRST_LABELS.get("".join(map(str, parts[1][:32])), name)
    if found != name and folder.name != name:   # a folder of its own name is trusted
        raise InputError(f"{folder} holds {found}, whose files have the same names; "
                         f"put those of {name} into {folder / name}, "
                         f"or choose data {found}")
    return parts


def _locate(name, root):
    """The folder that holds the files of a data set;
    if none does, the first, downloaded into.
    """
    source, home = _SOURCES[name], Path(root or os.environ.get("DATA_DIR") or "data")
    packaged = () if root else map(Path, source.packaged)
    for folder in (home / name, home, home / "cifar-10-batches-bin", *packaged):
        if all((folder / file).exists() or (folder / f"{file}.gz").exists()
               for file in source.files):
            return folder

    try:
        for file, md5 in source.md5.items():
            _download(source.mirror + file, home / name, md5)
    except (OSError, http.client.HTTPException) as error:   # the latter if cut short
        package = (", or install Debian's package dataset-fashion-mnist"
                   if source.packaged else "")
        raise InputError(f"{name} is not here and could not be downloaded ({error}); "
                         f"put {', '.join(source.files)} (plain or .gz) into {home / name}, "
                         f"or name their folder with --data-dir{package}") from None
    return home / name


def _download(url, folder, md5):
    """Fetches url into folder if its MD5 is right;
    of an archive only files known by name.
    """
    with urllib.request.urlopen(url, timeout=30) as response:
        content = response.read()
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise OSError(f"{url} has MD5 {found} instead of {md5}")

    files = {url.rpartition("/")[2]: content}
    if url.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {Path(member.name).name: member
                       for member in archive if member.isfile()}
            files = {name: archive.extractfile(member).read()
                     for name, member in members.items() if name in _CIFAR}

    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        with whole_file(folder / file) as target:
            target.write(data)


@contextlib.contextmanager
def whole_file(path):
    """A binary file that comes to stand under its name whole, on the disk,
    or not at all.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(folder, file):
    """(content, path) of a file, plain or else .gz."""
    path = folder / file
    if not path.exists():
        path = folder / f"{file}.gz"
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content), path
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); "
                         "delete it to download it again") from None


def _read_idx(folder, file):
    """An IDX file as a uint8 array:
    big-endian magic, the sizes of its dimensions, the bytes.
    """
    content, path = _read(folder, file)
    dimensions = 3 if "images" in file else 1
    magic, start = 0x800 + dimensions, 4 + 4 * dimensions
    if len(content) < start or int.from_bytes(content[:4], "big") != magic:
        raise InputError(f"{path} does not begin with the IDX magic {magic:#x}; "
                         f"it is no {file} file")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    size = start + math.prod(shape)
    if len(content) != size:
        raise InputError(f"{path} holds {len(content)} bytes "
                         f"where its header says {size}; "
                         "delete it to download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar(folder, files):
    """Images (N, 3072) and labels (N,):
    records of a label byte, then 3 x 32 x 32 bytes.
    """
    contents = []
    for file in files:
        content, path = _read(folder, file)
        if len(content) == 0 or len(content) % 3073:
            raise InputError(f"{path} holds {len(content)} bytes, "
                             "no multiple of 3073; "
                             "delete it to download it again")
        contents.append(content)
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


# ---- text and tokens ----

# count tokens of a dtype, from a byte offset
Piece = namedtuple("Piece", "path dtype offset count")


@_readable()
def load_text(name, context, device="cpu", vocab_size=0, val_size=64):
    """Splits(Tokens, None, x_val (V, T), y_val (V, T), classes), T = context,
    to predict next tokens.

    stdlib: the sources of Python's own standard library, as bytes. Else a path:
    text files as bytes (256 tokens), nanoGPT's .bin of uint16, or llm.c's
    shards; all of a folder but hidden ones. Only these are read: the windows
    asked for, the largest token of .bin files if vocab_size is 0, and val_size
    windows spread evenly over the validation files. InputError: no such path,
    damaged files, too few tokens for a window, a token outside the vocabulary.
    """
    train, val = ([piece for piece in pieces if piece.count]
                  for pieces in _text_pieces(name))
    for words, pieces in (("train", train), ("validate", val)):
        count = sum(piece.count for piece in pieces)
        if count <= context:
            raise InputError(f"{name} holds {count} tokens to {words} on; "
                             f"context {context} needs more "
                             "(of a folder every tenth text file validates, "
                             "or .bin files with val in their names)")
    if not vocab_size:
        is_text = all(piece.dtype == "u1" for piece in train + val)
        vocab_size = (256 if is_text
                      else 1 + max(int(_map(piece).max()) for piece in train + val))

    train, val = Tokens(train, vocab_size), Tokens(val, vocab_size)
    starts = torch.linspace(0, len(val) - context - 1, val_size, dtype=torch.float64)
    windows = val.windows(starts.long().unique(), context + 1).to(device)   # (V, T + 1)
    return Splits(train, None, windows[:, :-1], windows[:, 1:], vocab_size)


class Tokens:
    """The tokens of many files end to end, memory-mapped."""

    def __init__(self, pieces, vocabulary):
        self.pieces, self.vocabulary = pieces, vocabulary
        # positions where the pieces begin, and the end
        self.begins = [0, *itertools.accumulate(piece.count for piece in pieces)]
        # fewer maps than the files that a process may hold open
        self._part = functools.lru_cache(512)(lambda i: _map(pieces[i]))

    def __len__(self):
        return self.begins[-1]

    def windows(self, starts, length):
        """Tokens (..., length) from positions starts (...), int64 on the CPU.

        InputError: a token outside the vocabulary.
        """
        rows = np.empty((starts.numel(), length), np.int64)
        for row, start in zip(rows, starts.flatten().tolist()):
            i, done = bisect.bisect(self.begins, start) - 1, 0  # begins in piece i
            while done < length:
                begin = start + done - self.begins[i]
                part = self._part(i)[begin:begin + length - done]
                row[done:done + len(part)] = part
                done, i = done + len(part), i + 1
        if rows.max() >= self.vocabulary:
            raise InputError(f"token {rows.max()} in {self.pieces[0].path} "
                             "or its neighbours is outside the vocabulary of "
                             f"{self.vocabulary}; give --vocab-size, or 0 to find it")
        return torch.from_numpy(rows).view(*starts.shape, length)

    @functools.cached_property
    def frequencies(self):
        """Relative frequency (C,) of every token,
        over the first 16M tokens; float64.
        """
        counts, left = np.zeros(self.vocabulary, np.int64), 2 ** 24
        for i in range(len(self.pieces)):
            part = self._part(i)[:left]
            counts += np.bincount(part, minlength=self.vocabulary)[:self.vocabulary]
            left -= len(part)
            if not left:
                break
        return torch.from_numpy(counts / counts.sum())


@_readable()
def _map(piece):
    return np.asarray(np.memmap(piece.path, piece.dtype, "r", piece.offset, (piece.count,)))


def _text_pieces(name):
    """(pieces to train on, pieces to validate on).

    Of a single file the last tenth validates; of a folder every tenth file, or
    of one with .bin files those with "val" in their names.
    """
    path = Path(sysconfig.get_paths()["stdlib"] if name == "stdlib" else name)
    if path.is_file():
        piece = _piece(path)
        cut = piece.count - piece.count // 10
        after = piece.offset + np.dtype(piece.dtype).itemsize * cut
        return ([piece._replace(count=cut)],
                [piece._replace(offset=after, count=piece.count - cut)])
    if not path.is_dir():
        raise InputError(f"data {name!r} is no file or folder; choose stdlib, "
                         "or the path of text, .bin tokens or a folder of them")

    files = _text_files(path, name == "stdlib")
    shards = [file for file in files if file.suffix == ".bin"]
    val = [file for file in shards if "val" in file.name] if shards else files[9::10]
    train = sorted({*(shards or files)} - {*val})
    return [_piece(file) for file in train], [_piece(file) for file in val]


def _text_files(folder, stdlib):
    """The files below a folder that hold anything, sorted,
    without any in hidden folders.
    """
    skipped = ({"test", "tests", "idle_test", "site-packages", "dist-packages"}
               if stdlib else ())

    def belongs(file):
        parts = file.relative_to(folder).parts  # the folder itself may be hidden
        left_out = any(part.startswith(".") or part in skipped for part in parts)
        return not left_out and file.is_file() and file.stat().st_size

    return sorted(filter(belongs, folder.rglob("*.py" if stdlib else "*")))


def _piece(path):
    """One file of tokens: bytes; .bin as of llm.c
    (256 int32: 20240520, 1, count; then uint16) or nanoGPT (uint16 alone).
    """
    size = path.stat().st_size
    if path.suffix != ".bin":
        return Piece(path, "u1", 0, size)
    header = np.fromfile(path, "<i4", 256).tolist()
    if header and header[0] in (20240520, 20240801):        # the latter: shards of uint32
        if (len(header) < 256 or header[:2] != [20240520, 1]
                or size != 1024 + 2 * header[2]):
            raise InputError(f"{path} has the header {header[:3]} and {size} bytes; "
                             "a shard of uint16 tokens has 20240520, 1, count, "
                             "and 1024 + 2 count bytes")
        return Piece(path, "<u2", 1024, header[2])
    if size % 2:
        raise InputError(f"{path} holds {size} bytes; "
                         "a .bin file of uint16 tokens has an even number")
    return Piece(path, "<u2", 0, size // 2)

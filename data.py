"""The data of a run: generated samples, image files, arrays of your own, text and
tokens -> Splits.

    N samples   D input dimension   C classes, or tokens of the vocabulary
    V validation samples   R replicas   B batch size   T context: tokens of a window
    K dimension of real-valued targets

    splits = load_data("multi_index")               # generated: x (N, D), y (N,)
    splits = load_data("fashion_mnist", "data")     # standard files, downloaded where missing
    splits = load_data("table.npz")                 # arrays x, y, perhaps x_val, y_val
    splits = load_data("mine.py:load")              # what your function returns
    splits = load_text("stdlib", context=32)        # next-token prediction, memory-mapped
    x, y = splits.batch(torch.randint(splits.samples, (R, B)))

Needs torch and numpy; can be copied alone. Never unpickles. Out of scope: data
augmentation, tokenizers.
"""
import contextlib
import gzip
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import sys
import sysconfig
import tarfile
import time
import urllib.request
import zlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SHAPES = {      # (D, C) of the data sets that have a name
    "multi_index": (100, 2),
    "mnist": (784, 10),
    "fashion_mnist": (784, 10),
    "cifar10": (3072, 10),
}


def stream(seed, purpose):
    """Return a torch.Generator of its own for a seed and a purpose (weights, batches, ...)."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose))


def stream_seed(seed, purpose):
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8]) >> 1


class InputError(ValueError):
    """Input that a user can fix: names the value, what is allowed, and the remedy."""


@contextlib.contextmanager
def _os_errors_as_input_errors():
    try:
        yield
    except OSError as error:
        raise InputError(f"data cannot be read: {error}") from None


class Splits(NamedTuple):
    """Training and validation data on one device; for text, x is memory-mapped."""
    x: "torch.Tensor | Tokens"      # (N, D)
    y: "torch.Tensor | None"        # classes (N,) int64, real-valued (N, K); None for text
    x_val: torch.Tensor             # (V, D); text: (V, T)
    y_val: torch.Tensor             # as y; text: (V, T), the tokens after
    outputs: int                    # C, or K of real-valued targets
    shape: tuple = ()               # of one sample as it was given
    digest: str = ""                # hash of the content, empty for generated data

    @property
    def samples(self):
        """N; for text the number of tokens at which a window can begin."""
        return len(self.x) - (self.x_val.shape[-1] if self.y is None else 0)

    @property
    def is_real_valued(self):
        return self.y is not None and self.y.is_floating_point()

    @property
    def frequencies(self):
        """Relative frequencies (C,) of the training labels, or of the tokens; float64."""
        if self.y is None:
            return self.x.frequencies
        return torch.bincount(self.y, minlength=self.outputs).double() / len(self.y)

    def batch(self, index):
        """Return (x, y) of samples index (R, B): rows (R, B, D) and their targets (R, B, ...).

        For text: the windows (R, B, T) that begin at those tokens, and the tokens
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

    def describe(self):
        """Return one line that says what was read."""
        if self.y is None:
            return (f"data: {len(self.x):,} tokens of a vocabulary of {self.outputs:,}; "
                    f"{len(self.x_val):,} windows of {self.x_val.shape[-1]} to validate")
        targets = "targets" if self.is_real_valued else "classes"
        shape = f"({', '.join(map(str, self.shape))}{',' * (len(self.shape) == 1)})"
        return (f"data: {self.samples:,} samples {shape}, {self.outputs:,} {targets}; "
                f"{len(self.x_val):,} to validate")


def is_text(name):
    """Whether data of this name are text or tokens, which load_text reads."""
    return name not in SHAPES and not _is_arrays(name)


def _is_arrays(name):
    return name.endswith(".npz") or bool(re.search(r"\.py:\w+$", name))


def load(config, data_dir=None, device="cpu"):
    """Return the Splits that a run's config names."""
    name, val_size = config["data"], config["val_size"]
    if is_text(name):
        return load_text(name, config["context"], device, config["vocab_size"], val_size)
    # bfloat16 is autocast's: data stay float32
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    return load_data(name, data_dir, device, dtype,
                     config["train_size"], val_size, config["data_seed"])


@_os_errors_as_input_errors()
def load_data(name, root=None, device="cpu", dtype=torch.float32,
              train_size=20_000, val_size=1_000, data_seed=0):
    """Return Splits of generated samples, images or arrays on the device.

    multi_index: train_size and val_size samples from data_seed.
    mnist, fashion_mnist, cifar10: standard files (IDX or CIFAR-10 binary, plain
    or .gz) in root, else $DATA_DIR, else ./data, each with or without a folder of
    the data set's name, else where Debian's dataset-fashion-mnist puts them, else
    downloaded, MD5 checked. The first val_size test samples validate.
    FILE.npz: arrays x (N, ...) and y, perhaps x_val and y_val.
    FILE.py:FUNCTION: what the function, called without arguments, returns:
    (x, y) or (x, y, x_val, y_val), of numpy or torch.

    Whole-number y (N,) are classes; real-valued y (N,) or (N, K) are targets.
    Without x_val the last tenth after a shuffle by data_seed validates. Inputs are
    shifted and scaled to the training split's mean 0 and variance 1, but those of
    a function are used as it returns them. InputError: an unknown name, damaged
    files, those of another data set, missing files that cannot be downloaded,
    arrays that do not fit one another.
    """
    if name == "multi_index":
        generator = stream(data_seed, "samples")
        x, y = multi_index(train_size, generator)
        x_val, y_val = multi_index(val_size, generator)
        arrays, shape, digest = (x, y, x_val, y_val), x.shape[1:], ""
    elif name in SHAPES:
        arrays = _read_images(name, root)
        shape, digest = arrays[0].shape[1:], _digest_of_arrays(arrays)
        arrays = [torch.from_numpy(np.array(part)) for part in arrays]
        arrays[2:] = [part[:val_size] for part in arrays[2:]]
    elif _is_arrays(name):
        read = _read_npz if name.endswith(".npz") else _call_function
        arrays = _checked_arrays(name, read(name))
        shape, digest = arrays[0].shape[1:], _digest_of_arrays(arrays)
        arrays = [torch.from_numpy(part) for part in arrays]
        if len(arrays) == 2:
            arrays = _hold_out_a_tenth(*arrays, data_seed)
    else:
        raise InputError(f"unknown data {name!r}; choose from {', '.join(SHAPES)}, "
                         "FILE.npz or FILE.py:FUNCTION")

    x, y, x_val, y_val = arrays
    x, x_val = (part.flatten(1).to(torch.promote_types(part.dtype, torch.float32))
                for part in (x, x_val))
    if name != "multi_index" and ".py:" not in name:
        mean, std = x.mean(), x.std()
        if not std > 0:
            raise InputError(f"x of {name} is constant, so it cannot be scaled to variance 1")
        x, x_val = (x - mean) / std, (x_val - mean) / std
    if y.is_floating_point():
        y, y_val = (part.reshape(len(part), -1).to(device, dtype) for part in (y, y_val))
        outputs = y.shape[1]
    else:
        y, y_val = y.long().to(device), y_val.long().to(device)
        outputs = SHAPES[name][1] if name in SHAPES else int(max(y.max(), y_val.max())) + 1
    return Splits(x.to(device, dtype), y, x_val.to(device, dtype), y_val,
                  outputs, tuple(shape), digest)


def multi_index(size, generator):
    """Draw x (size, 100) ~ N(0, I) and y = [relu(x1) + relu(x2) > relu(x3) + relu(x4)].

    The two classes are balanced.
    """
    x = torch.randn(size, SHAPES["multi_index"][0], generator=generator)
    z = torch.relu(x[:, :4])
    return x, (z[:, 0] + z[:, 1] > z[:, 2] + z[:, 3]).long()


def _hold_out_a_tenth(x, y, seed):
    order = torch.randperm(len(x), generator=stream(seed, "split"))
    train, val = order.tensor_split([len(x) - max(1, len(x) // 10)])
    return x[train], y[train], x[val], y[val]


def _digest_of_arrays(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


# ---- arrays of the user's ----

def _read_npz(name):
    try:
        with np.load(name, allow_pickle=False) as file:
            names = [key for key in ("x", "y", "x_val", "y_val") if key in file.files]
            if names not in (["x", "y"], ["x", "y", "x_val", "y_val"]):
                raise InputError(f"{name} holds arrays {', '.join(file.files) or 'no'}; it must "
                                 "hold x and y, and perhaps x_val and y_val")
            return [file[key] for key in names]
    except (InputError, OSError):
        raise
    except Exception as error:      # numpy and zipfile meet damage with any error
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name} is damaged or holds Python objects ({reason}); "
                         "save plain arrays with numpy.savez") from None


def _call_function(spec):
    """Return what FILE.py:FUNCTION returns; its own errors keep their traceback."""
    file, _, function = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"data is {spec!r}, and {file} is no file; give FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"custom_data_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module          # dataclasses look their module up
    sys.path.append(str(path.parent))
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise InputError(f"data is {spec!r}, and {file} has no function {function!r}")
        returned = getattr(module, function)()
    except OSError as error:        # else it would pass for an unreadable file of ours
        raise RuntimeError(f"{spec} raised an error") from error
    finally:
        sys.path.remove(str(path.parent))
    if isinstance(returned, (tuple, list)) and len(returned) in (2, 4):
        return returned
    raise InputError(f"{spec} returned a {type(returned).__name__}; it must return "
                     "(x, y) or (x, y, x_val, y_val)")


def _checked_arrays(name, arrays):
    """Return the arrays as numpy's; InputError where they do not fit one another."""
    def require(holds, message):
        if not holds:
            raise InputError(f"{name}: {message}")

    try:
        arrays = [part.detach().cpu().numpy() if isinstance(part, torch.Tensor)
                  else np.asarray(part) for part in arrays]
    except (TypeError, ValueError) as error:        # ragged lists, types that numpy lacks
        raise InputError(f"{name}: {error}") from None
    for key, array in zip(("x", "y", "x_val", "y_val"), arrays):
        require(array.dtype.kind in "biuf" and array.itemsize <= 8,
                f"{key} holds {array.dtype}; it must hold numbers of at most 64 bits")
        require(array.ndim and len(array), f"{key} has shape {array.shape}; it must have samples")
        require(array.dtype.kind != "f" or np.isfinite(array).all(),
                f"{key} holds nan or infinite values; remove those samples")
    for x, y in zip(arrays[::2], arrays[1::2]):
        require(len(x) == len(y), f"{len(x)} samples of x but {len(y)} of y")
        require(x.ndim > 1 and x.shape[1:] == arrays[0].shape[1:],
                f"x has shape {x.shape}; it must be (N, ...), the same in both splits")
        require(y.dtype.kind == arrays[1].dtype.kind or y.dtype.kind in "biu"
                and arrays[1].dtype.kind in "biu", "y and y_val are of different kinds")
        if y.dtype.kind == "f":
            require(y.ndim < 3 and y.shape[1:] == arrays[1].shape[1:],
                    f"real-valued y has shape {y.shape}; it must be (N,) or (N, K)")
        else:
            require(y.ndim == 1, f"classes y have shape {y.shape}; they must be (N,)")
            require(y.min() >= 0, f"y holds the class {y.min()}; classes begin at 0")
    require(arrays[1].dtype.kind == "f" or arrays[1].max() > 0, "y holds one class only")
    require(len(arrays) == 4 or len(arrays[0]) > 1, "one sample cannot be split")
    # torch knows no foreign byte order, and classes are int64
    return [np.ascontiguousarray(part, np.int64 if i % 2 and part.dtype.kind != "f"
                                 else part.dtype.newbyteorder("="))
            for i, part in enumerate(arrays)]


# ---- image files ----

class DatasetFiles(NamedTuple):
    """Where the files of a data set come from."""
    files: tuple            # needed, plain or .gz
    mirror: str
    md5: dict               # {file to download: its MD5}
    packaged: tuple = ()    # folders of a Debian package


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)
_IDX_GZ = [f"{file}.gz" for file in _IDX]
_DATASETS = {
    "mnist": DatasetFiles(
        _IDX, "https://ossci-datasets.s3.amazonaws.com/mnist/",
        dict(zip(_IDX_GZ, (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c")))),
    "fashion_mnist": DatasetFiles(
        _IDX, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        dict(zip(_IDX_GZ, (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))),
        ("/usr/share/datasets/fashion-mnist",)),
    "cifar10": DatasetFiles(
        _CIFAR, "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}
# MNIST and Fashion-MNIST name their files the same; their first labels tell them apart.
_FIRST_LABELS = {
    "50419213143536172869409112432738": "mnist",
    "90030272550955791064314843024453": "fashion_mnist",
}


def _read_images(name, root):
    """Return training images (N, ...) and labels (N,), test images and labels, uint8."""
    folder, (values, classes) = _locate(name, root), SHAPES[name]
    if name == "cifar10":
        parts = [*_read_cifar(folder, _CIFAR[:5]), *_read_cifar(folder, _CIFAR[5:])]
    else:
        parts = [_read_idx(folder, file) for file in _IDX]

    for images, labels in (parts[:2], parts[2:]):
        if len(images) != len(labels) or len(labels) == 0:
            raise InputError(f"{folder} holds {len(images)} images but {len(labels)} labels")
        if images[0].size != values or labels.max() >= classes:
            raise InputError(f"{folder} holds images of {images[0].size} values "
                             f"and labels up to {labels.max()}; "
                             f"{name} has {values} values and classes 0 to {classes - 1}")

    actual = _FIRST_LABELS.get("".join(map(str, parts[1][:32])), name)
    if actual != name and folder.name != name:      # a folder of its own name is trusted
        raise InputError(f"{folder} holds {actual}, whose files have the same names; put those of "
                         f"{name} into {folder / name}, or choose data {actual}")
    return parts


def _locate(name, root):
    """Return the folder that holds the files of a data set, downloaded if none does."""
    dataset, home = _DATASETS[name], Path(root or os.environ.get("DATA_DIR") or "data")
    packaged = () if root else map(Path, dataset.packaged)
    for folder in (home / name, home, home / "cifar-10-batches-bin", *packaged):
        if all((folder / file).exists() or (folder / f"{file}.gz").exists()
               for file in dataset.files):
            return folder

    try:
        for file, md5 in dataset.md5.items():
            _download(dataset.mirror + file, home / name, md5)
    except (OSError, http.client.HTTPException) as error:   # the latter if cut short
        package = (", or install Debian's package dataset-fashion-mnist"
                   if dataset.packaged else "")
        raise InputError(f"{name} is missing and could not be downloaded ({error}); "
                         f"put {', '.join(dataset.files)} (plain or .gz) into {home / name}, "
                         f"or name their folder with --data-dir{package}") from None
    return home / name


def _download(url, folder, md5):
    """Fetch url into folder if its MD5 is right; of an archive only files known by name."""
    with urllib.request.urlopen(url, timeout=30) as response:
        content = response.read()
    checksum = hashlib.md5(content).hexdigest()
    if checksum != md5:
        raise OSError(f"{url} has MD5 {checksum} instead of {md5}")

    files = {url.rpartition("/")[2]: content}
    if url.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            files = {name: archive.extractfile(member).read()
                     for name, member in members.items() if name in _CIFAR}

    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        with whole_file(folder / file) as target:
            target.write(data)


def _read(folder, file):
    """Return (content, path) of a file, plain or else .gz."""
    path = folder / file
    if not path.exists():
        path = folder / f"{file}.gz"
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content), path
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to download it again") from None


def _read_idx(folder, file):
    """Read an IDX file: big-endian magic, the sizes of its dimensions, uint8 values."""
    content, path = _read(folder, file)
    dimensions = 3 if "images" in file else 1
    magic, start = 0x800 + dimensions, 4 + 4 * dimensions
    if len(content) < start or int.from_bytes(content[:4], "big") != magic:
        raise InputError(f"{path} does not begin with the IDX magic {magic:#x}; "
                         f"it is no {file} file")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    size = start + math.prod(shape)
    if len(content) != size:
        raise InputError(f"{path} holds {len(content)} bytes where its header says {size}; delete "
                         "it to download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar(folder, files):
    """Return images (N, 3, 32, 32) and labels (N,): records of a label and 3072 bytes."""
    contents = []
    for file in files:
        content, path = _read(folder, file)
        if len(content) == 0 or len(content) % 3073:
            raise InputError(f"{path} holds {len(content)} bytes, no multiple of 3073; delete it "
                             "to download it again")
        contents.append(content)
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


# ---- text and tokens ----

@_os_errors_as_input_errors()
def load_text(name, context, device="cpu", vocab_size=0, val_size=64):
    """Return Splits(Tokens, None, x_val (V, T), y_val (V, T), vocabulary), T = context,
    to predict next tokens.

    stdlib: the sources of Python's own standard library, as bytes. Else a path:
    UTF-8 text as bytes (256 tokens); .npy of any whole type; .bin of nanoGPT
    (uint16) or of llm.c and modded-nanogpt (a header, then uint16); or a folder.
    Of a folder every tenth text file validates, or the token files with val in
    their names; of a single file the last tenth. Files are memory-mapped; val_size
    windows are spread evenly over the validation files. InputError: no such path,
    damaged files, files that are no text, too few tokens for a window, a token
    outside the vocabulary.
    """
    train, val, files = _token_arrays(name)
    for purpose, part in (("train", train), ("validate", val)):
        count = sum(map(len, part))
        if count <= context:
            raise InputError(f"{name} holds {count} tokens to {purpose} on; context {context} "
                             "needs more (of a folder every tenth text file validates, or token "
                             "files with val in their names)")
    if not vocab_size:
        is_bytes = all(file.dtype == "u1" for file in files)
        vocab_size = 256 if is_bytes else 1 + max(int(file.max(initial=0)) for file in files)

    digest = hashlib.sha256("".join(map(_digest_of_file, files)).encode()).hexdigest()[:16]
    train, val = Tokens(train, vocab_size), Tokens(val, vocab_size)
    starts = torch.linspace(0, len(val) - context - 1, val_size, dtype=torch.float64)
    windows = val.windows(starts.long().unique(), context + 1).to(device)   # (V, T + 1)
    return Splits(train, None, windows[:, :-1], windows[:, 1:], vocab_size, (), digest)


class Tokens:
    """The tokens of many arrays end to end."""

    def __init__(self, arrays, vocabulary):
        self.arrays, self.vocabulary = arrays, vocabulary
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def windows(self, starts, length):
        """Return tokens (..., length) from positions starts (...), int64 on the CPU.

        InputError: a token outside the vocabulary.
        """
        positions = starts.flatten()[:, None].numpy() + np.arange(length)   # (B, length)
        array_of = np.searchsorted(self.ends, positions, side="right")
        tokens = np.empty(positions.shape, np.int64)
        for i in np.unique(array_of):
            here = array_of == i
            begin = self.ends[i] - len(self.arrays[i])
            tokens[here] = self.arrays[i][positions[here] - begin]
        if not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            bad = tokens.min() if tokens.min() < 0 else tokens.max()
            raise InputError(f"token {bad} is outside the vocabulary of "
                             f"{self.vocabulary}; give --vocab-size, or 0 to find it")
        return torch.from_numpy(tokens).view(*starts.shape, length)

    @cached_property
    def frequencies(self):
        """Relative frequency (C,) of every token over the first 16M tokens; float64."""
        counts, left = np.zeros(self.vocabulary, np.int64), 2 ** 24
        for array in self.arrays:
            part = array[:left]
            counts += np.bincount(part[part >= 0], minlength=self.vocabulary)[:self.vocabulary]
            left -= len(part)
            if not left:
                break
        return torch.from_numpy(counts / counts.sum())


def _token_arrays(name):
    """Return (arrays to train on, arrays to validate on, arrays of whole files)."""
    path = Path(sysconfig.get_paths()["stdlib"] if name == "stdlib" else name)
    if path.is_file():
        array = _memory_map(path)
        cut = len(array) - len(array) // 10
        return [array[:cut]], [array[cut:]], [array]
    if not path.is_dir():
        raise InputError(f"data {name!r} is no file or folder; choose stdlib, or the path "
                         "of text, of .bin or .npy tokens, or of a folder of them")

    skipped = ({"test", "tests", "idle_test", "site-packages", "dist-packages"}
               if name == "stdlib" else ())

    def belongs(file):
        parts = file.relative_to(path).parts    # the folder itself may be hidden
        left_out = any(part.startswith(".") or part in skipped for part in parts)
        return not left_out and file.is_file() and file.stat().st_size

    files = sorted(filter(belongs, path.rglob("*.py" if name == "stdlib" else "*")))
    tokens = [file for file in files if file.suffix in (".bin", ".npy")]
    val = [file for file in tokens if "val" in file.name] if tokens else files[9::10]
    array_of = {file: _memory_map(file, check_text=name != "stdlib") for file in tokens or files}
    train = [array for file, array in array_of.items() if file not in val]
    return train, [array_of[file] for file in val], list(array_of.values())


def _memory_map(path, check_text=True):
    """Return the tokens of one file as an array (count,) that stays on the disk."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:
            raise
        except Exception as error:      # numpy meets a damaged header with any error
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path} is damaged or holds no tokens ({reason})") from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"{path} holds {array.dtype} of shape {array.shape}; "
                             "tokens are whole numbers of shape (N,)")
        return array
    if path.suffix != ".bin":
        if check_text:
            _check_text(path)
        return np.memmap(path, "u1", "r") if size else np.empty(0, "u1")

    header = np.fromfile(path, "<i4", 256).tolist()
    if header and header[0] in (20240520, 20240801):        # the latter: shards of uint32
        if (len(header) < 256 or header[:2] != [20240520, 1] or size != 1024 + 2 * header[2]):
            raise InputError(f"{path} has the header {header[:3]} and {size} bytes; a shard of "
                             "uint16 tokens has 20240520, 1, count, and 1024 + 2 count bytes")
        return np.memmap(path, "<u2", "r", 1024, (header[2],))
    if size % 2:
        raise InputError(f"{path} holds {size} bytes; "
                         "a .bin file of uint16 tokens has an even number")
    first = np.fromfile(path, "<u2", 2 ** 16)
    if len(first) > 64 and (first[1::2] == 0).mean() > 0.9 and (first[::2] == 0).mean() < 0.75:
        raise InputError(
            f"every other uint16 of {path} is zero, as if its tokens were wider; convert them: "
            f"numpy.save('tokens.npy', numpy.fromfile({path.name!r}, numpy.uint32))")
    return np.memmap(path, "<u2", "r") if size else np.empty(0, "<u2")


def _check_text(path):
    """Raise InputError for a file that is not UTF-8 text."""
    with open(path, "rb") as file:
        head = file.read(2 ** 16)[:-4]
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":        # a character cut in two
            raise InputError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); "
                             "convert it, or give tokens as .npy or .bin") from None


def _digest_of_file(array):
    """Return a hash of a file; above 64 MB of its size, head, tail and sixteen blocks."""
    if not isinstance(array, np.memmap):
        return "empty"
    digest, block = hashlib.sha256(), 2 ** 20
    with open(array.filename, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        starts = (range(0, size, block) if size <= 64 * block
                  else [int(i * (size - block) / 17) for i in range(18)])
        digest.update(str(size).encode())
        for start in starts:
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()


# ---- writing files ----

@contextlib.contextmanager
def whole_file(path):
    """A binary file that gets its name when it is whole and on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for patience in range(20, -1, -1):
            try:
                partial.replace(path)
                break
            except PermissionError:     # Windows, while somebody reads the old file
                if not patience:
                    raise
                time.sleep(0.1)
    finally:
        partial.unlink(missing_ok=True)


def null_if_not_finite(value):
    """Return the value with None for every number in it that is not finite: strict JSON."""
    if isinstance(value, dict):
        return {key: null_if_not_finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_if_not_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write strict JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(null_if_not_finite(value), indent=1) + "\n").encode())

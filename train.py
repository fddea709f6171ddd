"""Trains many runs as one stack; one run is a stack of one.

    configuration -> param.param_groups -> a learning rate per replica and tensor -> W <- W - lr * gradient -> one row

A sweep is hundreds of small runs that differ in little but learning rate and seed. Runs of the same shape, data and
loss train here as one stacked model: weights (R, fan_out, fan_in), batches (R, B, ...), one batched product per layer.
Every replica keeps its own seed and learning rates, and ends with the row it would have alone: torch.optim on
`param.param_groups`, to rounding. A replica whose loss is no longer finite is recorded and leaves the stack.

    R replicas   B batch size   D input dimension   C classes   χ = dloss/dlogits
    Losses are means over samples. ce: cross-entropy. mse: (logits - one-hot)², mean over classes, raw logits (torch's
    nn.MSELoss). brier: the same on softmax probabilities.

    python train.py --width 512 --lr 0.1                # one run: progress on standard error, its row on standard output
    rows = train([{"width": 512, "lr": lr} for lr in (0.1, 0.2)])

Departures from the paper: batches are drawn with replacement. Out of scope: convolutions, data augmentation.
"""
import os
import sys
SAME_BITS = "torch" not in sys.modules or "MKL_CBWR" in os.environ
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")        # before torch loads MKL: same bits whatever the stack's size

import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import pickle
import platform
import subprocess
import sysconfig
import tarfile
import time
import urllib.request
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import metrics
import models
import param


# ------------------------------------------------------------------------------------------------------------------
# Configuration: every scientific setting of a run, with its one default

Kind = namedtuple("Kind", "type holds words")
COUNT = Kind(int, lambda v: 1 <= v < 2 ** 31, "a whole number from 1 to 2^31 - 1")
WHOLE = Kind(int, lambda v: 0 <= v < 2 ** 63 - 1, "a whole number, at least 0")
POSITIVE = Kind(float, lambda v: 0 < v < math.inf, "a positive number")
NONNEGATIVE = Kind(float, lambda v: 0 <= v < math.inf, "a number, at least 0")
FRACTION = Kind(float, lambda v: 0 <= v < 1, "a number in [0, 1)")
EXPONENT = Kind(float, lambda v: -10 <= v <= 10, "a number from -10 to 10")
TEXT = Kind(str, bool, "a name")
FLAG = Kind(bool, lambda v: True, "true or false")


def one_of(*names):
    return Kind(str, lambda v: v in names, "one of " + ", ".join(names))


DATASETS = {"multi_index": (100, 2), "mnist": (784, 10), "fashion_mnist": (784, 10), "cifar10": (3072, 10),
            "one_sample": (1, 2)}    # (D, C)

SETTINGS = {    # name: (default, kind, help)
    "model":         ("mlp", one_of("mlp", "gpt", "linear_net"), "network"),
    "width":         (256, COUNT, "hidden units"),
    "base_width":    (256, COUNT, "width at which all parameterizations coincide"),
    "hidden_layers": (3, COUNT, "hidden activations; 7 is the paper's 8-layer MLP"),
    "activation":    ("relu", one_of(*models.ACTIVATIONS), "nonlinearity"),
    "bias":          (False, FLAG, "biases, initially zero"),
    "layers":        (2, COUNT, "gpt: decoder layers"),
    "context":       (32, COUNT, "gpt: tokens of a sample"),
    "head_dim":      (32, COUNT, "gpt: size of an attention head, at every width"),
    "norm_affine":   (True, FLAG, "gpt: trainable gains of LayerNorm"),
    "qk_norm":       (True, FLAG, "gpt: LayerNorm on queries and keys"),
    "trainable":     ("all", one_of(*param.TRAINABLE), "readout: random features"),
    "data":          ("multi_index", TEXT, f"{', '.join(DATASETS)}; gpt: stdlib (Python's own sources as bytes), or a file or folder of "
                      "text or .bin tokens"),
    "vocab_size":    (0, WHOLE, "gpt: tokens; 0 is as many as the data has"),
    "train_size":    (20_000, COUNT, "multi_index: training samples"),
    "val_size":      (1_000, COUNT, "validation samples (of a file's test split, the first so many)"),
    "data_seed":     (0, WHOLE, "multi_index: seed of the samples"),
    "loss":          ("ce", one_of(*param.BOUNDED_DERIVATIVE), "loss"),
    "param":         ("sp", one_of(*param.PARAMETERIZATIONS), "parameterization"),
    "alpha":         (0.0, EXPONENT, "exponent: every LR times (width / base width)^-alpha"),
    "readout_scale": (1.0, NONNEGATIVE, "factor on the readout's initial standard deviation, at every width"),
    "optimizer":     ("sgd", one_of(*param.OPTIMIZERS), "optimizer (adam: AdamW)"),
    "lr":            (0.1, POSITIVE, "learning rate at the base width"),
    "momentum":      (0.0, FRACTION, "SGD momentum"),
    "beta1":         (0.9, FRACTION, "Adam: decay of the first moment"),
    "beta2":         (0.95, FRACTION, "Adam: decay of the second moment"),
    "eps":           (1e-8, POSITIVE, "Adam: ε at the base width"),
    "weight_decay":  (0.0, NONNEGATIVE, "lr * weight decay per step does not change with width; with momentum as in torch.optim.SGD"),
    "clip":          (0.0, NONNEGATIVE, "largest gradient norm over all tensors; 0 is no clipping"),
    "steps":         (200, COUNT, "optimizer steps"),
    "batch_size":    (64, COUNT, "samples a step"),
    "accumulate":    (1, COUNT, "gradient accumulation: parts into which each batch is cut"),
    "warmup":        (0, WHOLE, "steps of linear warmup at the base width"),
    "warmup_exponent": (0.0, EXPONENT, "exponent: warmup steps times (width / base width)^this, rounded"),
    "decay":         ("none", one_of("none", "cosine"), "cosine: to a tenth of the LR at the last step"),
    "label_noise":   (0.0, NONNEGATIVE, "linear_net: standard deviation of noise on the label, drawn anew at every step"),
    "seed":          (0, WHOLE, "seed of initialization and data order"),
    "dtype":         ("float32", one_of("float32", "float64", "bfloat16"), "bfloat16: float32 weights under autocast"),
}
FIXED = {"linear_net": {"data": "one_sample", "loss": "mse", "hidden_layers": 1, "activation": "identity", "dtype": "float64",
                        "optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "trainable": "all", "bias": False,
                        "readout_scale": 1.0}}     # what a model leaves no choice in
DEFAULTS = {    # (model, optimizer): the defaults that differ there; the GPT's are the paper's
    ("gpt", "sgd"):  dict(data="stdlib", base_width=64, batch_size=8, val_size=128, decay="cosine", warmup=10),
    ("gpt", "adam"): dict(data="stdlib", base_width=64, batch_size=8, val_size=128, decay="cosine", warmup=10,
                          eps=1e-12, weight_decay=0.1, clip=1.0),
    ("linear_net", "sgd"): dict(FIXED["linear_net"], base_width=64),
}
# What may differ within one stack; everything else is shape, data, loss or schedule.
PER_REPLICA = ("lr", "seed", "param", "alpha", "weight_decay", "eps", "trainable", "readout_scale")


def configure(run):
    """The full configuration of a run: defaults filled in. ValueError names a bad value, what is allowed, and where."""
    unknown = [name for name in run if name not in SETTINGS]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; choose from {', '.join(SETTINGS)}")
    defaults = {name: default for name, (default, _, _) in SETTINGS.items()}
    defaults.update(DEFAULTS.get(tuple(run.get(name, defaults[name]) for name in ("model", "optimizer")), {}))
    config = {}
    for name, (_, kind, _) in SETTINGS.items():
        value = run.get(name, defaults[name])
        number = kind.type in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if number and kind.type is float else value
        if not (isinstance(value, kind.type) and (kind.type is not int or number) and kind.holds(value)):
            raise ValueError(f"{name} is {value!r}; it must be {kind.words}")
        config[name] = value
    if config["batch_size"] % config["accumulate"]:
        raise ValueError(f"batch_size is {config['batch_size']}; it must be a multiple of accumulate = {config['accumulate']}")
    wrong = {name: value for name, value in FIXED.get(config["model"], {"label_noise": 0.0}).items() if config[name] != value}
    if wrong:
        must = ", ".join(f"{name} = {value!r} (not {config[name]!r})" for name, value in wrong.items())
        raise ValueError(f"model {config['model']} needs {must}")
    if (config["model"] == "gpt") == (config["data"] in DATASETS):
        raise ValueError(f"data is {config['data']!r}; " + (f"for model {config['model']} it must be one of {', '.join(DATASETS)}"
                         if config["model"] != "gpt" else "for model gpt it must be stdlib, or a file or folder of text or tokens"))
    for name in ("width", "base_width") if config["model"] == "gpt" else ():
        if config[name] % config["head_dim"]:
            raise ValueError(f"{name} is {config[name]}; for model gpt it must be a multiple of head_dim = {config['head_dim']}")
    if warmup_steps(config) > config["steps"]:
        raise ValueError(f"warmup is {warmup_steps(config)}, longer than the run; it must be at most steps = {config['steps']}")
    return config


def warmup_steps(config):
    return round(config["warmup"] * (config["width"] / config["base_width"]) ** config["warmup_exponent"])


def run_id(config):
    """Identity of a run: a hash of its full configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# Data

Splits = namedtuple("Splits", "x y x_val y_val classes")    # x (N, D) float, y (N,) int64, on one device; text: x Tokens, y None

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)
# data set: (files needed, plain or .gz; mirror; {file to download: MD5}; folders a package manager may have filled)
_FILES = {
    "mnist": (_IDX, "https://ossci-datasets.s3.amazonaws.com/mnist/", dict(zip((f"{name}.gz" for name in _IDX), (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"))), ()),
    "fashion_mnist": (_IDX, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      dict(zip((f"{name}.gz" for name in _IDX), (
                          "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                          "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))),
                      ("/usr/share/datasets/fashion-mnist",)),
    "cifar10": (_CIFAR, "https://www.cs.toronto.edu/~kriz/",
                {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}, ()),
}


def multi_index(size, generator):
    """x ~ N(0, I_100), y = [relu(x1) + relu(x2) > relu(x3) + relu(x4)]: two balanced classes."""
    x = torch.randn(size, 100, generator=generator)
    z = torch.relu(x[:, :4])
    return x, (z[:, 0] + z[:, 1] > z[:, 2] + z[:, 3]).long()


def _locate(name, root):
    """The folder that holds the files of a data set, downloading them into the first candidate if none does."""
    needed, mirror, downloads, packaged = _FILES[name]
    homes = [Path(root)] if root else [Path(os.environ["DATA_DIR"])] if os.environ.get("DATA_DIR") else [Path("data")]
    folders = [folder for home in homes for folder in (home / name, home, home / "cifar-10-batches-bin")]
    folders += [Path(folder) for folder in packaged if not root]
    for folder in folders:
        if all((folder / file).exists() or (folder / f"{file}.gz").exists() for file in needed):
            return folder
    try:
        for file, md5 in downloads.items():
            _download(mirror + file, folders[0], md5)
    except (OSError, http.client.HTTPException) as error:       # the latter where the connection ends too early
        package = ", or install Debian's package dataset-fashion-mnist" if packaged else ""
        raise ValueError(f"{name} is not here and could not be downloaded ({error}); put {', '.join(needed)} "
                         f"(plain or .gz) into {folders[0]}, or name their folder with --data-dir{package}") from None
    return folders[0]


def _download(url, folder, md5):
    """Fetches url into folder once its MD5 is right. Of an archive only the files known by name are kept, by name."""
    with urllib.request.urlopen(url, timeout=30) as response:
        content = response.read()
    if hashlib.md5(content).hexdigest() != md5:
        raise OSError(f"{url} has MD5 {hashlib.md5(content).hexdigest()} instead of {md5}")
    files = {url.rpartition("/")[2]: content}
    if url.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {Path(member.name).name: archive.extractfile(member).read()
                     for member in archive if member.isfile() and Path(member.name).name in _CIFAR}
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        with whole_file(folder / file) as target:
            target.write(data)


def _read(folder, file):
    path = folder / file
    if path.exists():
        return path.read_bytes(), path
    path = folder / f"{file}.gz"
    try:
        return gzip.decompress(path.read_bytes()), path
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to download it again") from None


def _read_idx(folder, file):
    """An IDX file as a uint8 array: big-endian 0x08, the number of dimensions, their sizes, then the bytes."""
    content, path = _read(folder, file)
    magic = 0x803 if "images" in file else 0x801
    header = np.frombuffer(content[:4 * (1 + magic % 256)].ljust(16), ">u4")[:1 + magic % 256]
    if len(content) < header.nbytes or header[0] != magic:
        raise ValueError(f"{path} does not begin with the IDX magic {magic:#x}; it is no {file} file")
    if len(content) != header.nbytes + math.prod(header[1:].tolist()):
        raise ValueError(f"{path} holds {len(content)} bytes where its header says "
                         f"{header.nbytes + math.prod(header[1:].tolist())}; delete it to download it again")
    return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:].tolist())


def _read_cifar(folder, files):
    """CIFAR-10 binary records: one label byte, then 3 x 32 x 32 bytes of colour planes."""
    records = []
    for file in files:
        content, path = _read(folder, file)
        if len(content) == 0 or len(content) % 3073:
            raise ValueError(f"{path} holds {len(content)} bytes, no multiple of 3073; delete it to download it again")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, 3073))
    records = np.concatenate(records)
    return records[:, 1:], records[:, 0]


def _read_images(name, root):
    """[(images (N, D), labels (N,)) for the training and the test split], uint8."""
    folder = _locate(name, root)
    if name == "cifar10":
        splits = [_read_cifar(folder, _CIFAR[:5]), _read_cifar(folder, _CIFAR[5:])]
    else:
        splits = [(_read_idx(folder, _IDX[i]), _read_idx(folder, _IDX[i + 1])) for i in (0, 2)]
    for images, labels in splits:
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(f"{folder} holds {len(images)} images but {len(labels)} labels")
        if images[0].size != DATASETS[name][0] or labels.max() >= DATASETS[name][1]:
            raise ValueError(f"{folder} holds images of {images[0].size} values and labels up to {labels.max()}; {name} has "
                             f"{DATASETS[name][0]} values and classes 0 to {DATASETS[name][1] - 1}")
    return [(images.reshape(len(images), -1), labels) for images, labels in splits]


Piece = namedtuple("Piece", "path dtype offset count")      # count tokens of a file, from a byte offset


class Tokens:
    """The tokens of many files end to end, memory-mapped: windows(starts, length) reads nothing else."""

    def __init__(self, pieces, vocabulary):
        self.pieces, self.vocabulary = pieces, vocabulary
        self.ends = np.cumsum([piece.count for piece in pieces])
        self.begins = [0, *self.ends.tolist()]
        self._map = functools.lru_cache(512)(       # fewer than a process may hold open
            lambda i: np.asarray(np.memmap(pieces[i].path, pieces[i].dtype, "r", pieces[i].offset, (pieces[i].count,))))

    def __len__(self):
        return int(self.ends[-1])

    def windows(self, starts, length):
        """Tokens (..., length), int64 on the CPU, from positions starts (...). ValueError on a token outside the vocabulary."""
        starts_, rows = starts.flatten().numpy(), np.empty((starts.numel(), length), np.int64)
        for row, start, i in zip(rows, starts_.tolist(), np.searchsorted(self.ends, starts_, side="right").tolist()):
            self._read(row, start, i)
        if rows.max() >= self.vocabulary:
            raise ValueError(f"token {rows.max()} in {self.pieces[0].path} or its neighbours is outside the vocabulary of "
                             f"{self.vocabulary}; give --vocab-size, or 0 to find it")
        return torch.from_numpy(rows).view(*starts.shape, length)

    def _read(self, row, start, i):
        """Fills row with the tokens from start on, which lies in piece i."""
        done = 0
        while done < len(row):
            begin = start + done - self.begins[i]
            part = self._map(i)[begin:begin + len(row) - done]
            row[done:done + len(part)] = part
            done, i = done + len(part), i + 1

    @functools.cached_property
    def frequencies(self):
        """Relative frequency of every token, over the first 16M tokens."""
        counts, left = np.zeros(self.vocabulary, np.int64), 2 ** 24
        for i, piece in enumerate(self.pieces):
            counts += np.bincount(self._map(i)[:left], minlength=self.vocabulary)[:self.vocabulary]
            left -= min(left, piece.count)
            if not left:
                break
        return torch.from_numpy(counts / counts.sum())


def _piece(path):
    """One file of tokens: .bin as llm.c writes them (256 int32: 20240520, 1, count; then uint16), or nanoGPT's uint16
    without a header; any other file as bytes."""
    size = path.stat().st_size
    if path.suffix != ".bin":
        return Piece(path, "u1", 0, size)
    header = np.fromfile(path, "<i4", 256)
    if len(header) and header[0] in (20240520, 20240801):
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1 or size != 1024 + 2 * int(header[2]):
            raise ValueError(f"{path} has the header {header[:3].tolist()} and {size} bytes; a shard of uint16 tokens has "
                             "20240520, 1, count, and 1024 + 2 count bytes")
        return Piece(path, "<u2", 1024, int(header[2]))
    if size % 2:
        raise ValueError(f"{path} holds {size} bytes; a .bin file of uint16 tokens has an even number")
    return Piece(path, "<u2", 0, size // 2)


def _text_pieces(name):
    """(pieces to train on, pieces to validate on). Of a folder with .bin files those with "val" in their names validate;
    of other files every tenth; of a single file the last tenth."""
    path = Path(sysconfig.get_paths()["stdlib"]) if name == "stdlib" else Path(name)
    if path.is_file():
        piece = _piece(path)
        cut, width = piece.count - piece.count // 10, np.dtype(piece.dtype).itemsize
        return [piece._replace(count=cut)], [piece._replace(offset=piece.offset + width * cut, count=piece.count - cut)]
    if not path.is_dir():
        raise ValueError(f"data {name!r} is no file or folder; choose stdlib, or the path of text, .bin tokens or a folder of them")
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"} if name == "stdlib" else set()
    files = sorted(file for file in path.rglob("*.py" if name == "stdlib" else "*") if file.is_file() and file.stat().st_size
                   and not skipped & set(file.relative_to(path).parts) and not file.name.startswith("."))
    shards = [file for file in files if file.suffix == ".bin"]
    if shards:
        val = [file for file in shards if "val" in file.name]
        return [_piece(file) for file in shards if file not in val], [_piece(file) for file in val]
    return [_piece(file) for i, file in enumerate(files) if i % 10 != 9], [_piece(file) for file in files[9::10]]


def load_text(name, context, device="cpu", vocab_size=0, val_size=64):
    """Splits(x = Tokens, y = None, x_val (V, T), y_val (V, T), classes) for next-token prediction over T = context tokens.

    stdlib: the sources of Python's own standard library, as bytes. Else a path: text files as bytes (256 tokens), nanoGPT's
    .bin of uint16, or llm.c's shards; several in a folder. Nothing is read but the windows asked for, the largest token of
    .bin files if vocab_size is 0, and val_size windows spread evenly over the validation files.

    ValueError: no such path, damaged files, fewer tokens than a window, or a token outside the vocabulary.
    """
    train, val = ([piece for piece in pieces if piece.count] for pieces in _text_pieces(name))
    for words, pieces in (("train", train), ("validate", val)):
        if sum(piece.count for piece in pieces) <= context:
            raise ValueError(f"{name} holds {sum(piece.count for piece in pieces)} tokens to {words} on; context {context} needs more "
                             "(of a folder every tenth text file validates, or the .bin files with val in their names)")
    if not vocab_size:
        vocab_size = 256 if all(piece.dtype == "u1" for piece in train + val) else 1 + max(
            int(np.memmap(piece.path, piece.dtype, "r", piece.offset, (piece.count,)).max()) for piece in train + val)
    train, val = Tokens(train, vocab_size), Tokens(val, vocab_size)
    starts = torch.linspace(0, len(val) - context - 1, val_size, dtype=torch.float64).long().unique()
    windows = val.windows(starts, context + 1).to(device)
    return Splits(train, None, windows[:, :-1], windows[:, 1:], vocab_size)


def load_data(name, root=None, device="cpu", dtype=torch.float32, train_size=20_000, val_size=1_000, data_seed=0):
    """Splits(x (N, D), y (N,), x_val, y_val, classes) on the device; for text see load_text.

    multi_index is generated: train_size and val_size samples from data_seed. one_sample is x = 1, y = 1, for linear_net.
    mnist, fashion_mnist and cifar10 are read from their standard files (IDX or CIFAR-10 binary, plain or .gz) in root, else
    $DATA_DIR, else ./data, each with or without a folder of the data set's name, else where Debian's dataset-fashion-mnist
    puts them; absent files are downloaded and their MD5 checked. Pixels are shifted and scaled to the training split's
    mean 0 and variance 1; of the test split the first val_size samples are used.

    ValueError: unknown name, damaged files (with the path), or absent files that cannot be downloaded (with the remedy).
    """
    if name == "multi_index":
        generator = torch.Generator().manual_seed(data_seed)
        (x, y), (x_val, y_val), classes = multi_index(train_size, generator), multi_index(val_size, generator), 2
    elif name == "one_sample":
        x, y, x_val, y_val, classes = torch.ones(1, 1), torch.ones(1).long(), torch.ones(1, 1), torch.ones(1).long(), 2
    elif name in _FILES:
        (x, y), (x_val, y_val) = ([torch.from_numpy(np.array(part)) for part in split] for split in _read_images(name, root))
        x, y, x_val, y_val, classes = x.float(), y.long(), x_val[:val_size].float(), y_val[:val_size].long(), 10
        mean, std = x.mean(), x.std()
        x, x_val = x.sub_(mean).div_(std), x_val.sub_(mean).div_(std)
    else:
        raise ValueError(f"unknown data {name!r}; choose from {', '.join(DATASETS)}")
    return Splits(x.to(device, dtype), y.to(device), x_val.to(device, dtype), y_val.to(device), classes)


def weight_dtype(config):
    """bfloat16 is autocast's: weights and data stay float32."""
    return torch.float64 if config["dtype"] == "float64" else torch.float32


def load_splits(config, data_dir, device):
    """The data of a run's configuration."""
    if config["model"] == "gpt":
        return load_text(config["data"], config["context"], device, config["vocab_size"], config["val_size"])
    return load_data(config["data"], data_dir, device, weight_dtype(config), config["train_size"], config["val_size"], config["data_seed"])


# ------------------------------------------------------------------------------------------------------------------
# Losses: logits (..., C), targets (...) -> loss per sample (...)

def ce(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def mse(logits, targets):
    return (logits - F.one_hot(targets, logits.shape[-1])).square().mean(-1)


def brier(logits, targets):
    return mse(logits.softmax(-1), targets)


LOSSES = {"ce": ce, "mse": mse, "brier": brier}


def chance_loss(loss, targets, classes):
    """Loss of the best constant predictor: the class frequencies p. ce: their entropy, for text the unigram entropy; mse,
    brier: mean of p (1 - p). targets: (N,) classes, or Tokens."""
    p = targets.frequencies if isinstance(targets, Tokens) else torch.bincount(targets, minlength=classes).double() / len(targets)
    return (-(p * p.clamp_min(1e-300).log()).sum() if loss == "ce" else (p * (1 - p)).mean()).item()


# ------------------------------------------------------------------------------------------------------------------
# The stack: {"weights": [(R, *shape)], "lr": [(R, 1, ...)], ...}, one entry per tensor in the model's order

def build(config):
    """The model, its base and the roles of its tensors; both on the meta device: only shapes matter here."""
    def network(width):
        if config["model"] == "gpt":
            return models.GPT(config["vocab_size"] or 256, width, config["layers"], config["context"], config["head_dim"],
                              config["norm_affine"], config["qk_norm"])
        d_in, classes = DATASETS[config["data"]]
        return models.MLP(d_in, width, config["hidden_layers"], classes, config["activation"], config["bias"])
    with torch.device("meta"):
        model, base = network(config["width"]), network(config["base_width"])
        return model, base, param.infer_roles(network(2 * config["base_width"]), base)     # known at the base width too


def replica_groups(run, model, base, roles):
    """param.param_groups of one run: what torch.optim would be given."""
    frozen = {role: 0.0 for role in param.ROLES if role not in param.TRAINABLE[run["trainable"]]}
    return param.param_groups(model, base, run["param"], run["optimizer"], run["lr"], run["alpha"],
                              run["weight_decay"], run["eps"], role_lr=frozen, overrides=roles)


def replica_init(run, model, base, roles, dtype):
    """The initial weights of one run, [shape] in the model's order, on the CPU, from the run's seed alone."""
    fresh = copy.deepcopy(model)
    fresh.load_state_dict({name: torch.empty(w.shape, dtype=dtype) for name, w in model.state_dict().items()}, assign=True)
    gain = math.sqrt(2) if run["model"] == "mlp" else 1.0       # He's for ReLU; a GPT's inputs are normalized
    readout = {"output": run["readout_scale"] * gain / math.sqrt(run["base_width"])}
    param.init_(fresh, base, run["param"], torch.Generator().manual_seed(run["seed"]), gain=gain, std=readout, overrides=roles)
    return [weights.detach() for weights in fresh.parameters()]


SCRATCH = ("grads", "calls")        # entries of a stack that optimizer steps make anew where they are missing


def stack_runs(runs, model, base, roles, device, dtype):
    """The stack of R runs: initial weights, and each replica's LR, weight decay and ε per tensor, as in param_groups."""
    names = [name for name, _ in model.named_parameters()]
    stack = {"weights": [torch.empty(len(runs), *p.shape, dtype=dtype, device=device) for p in model.parameters()]}
    drawn = {}      # replicas with the same initial weights are drawn once
    for r, run in enumerate(runs):
        key = run["seed"], run["param"], run["readout_scale"]
        source = [weights[drawn[key]] for weights in stack["weights"]] if key in drawn else replica_init(run, model, base, roles, dtype)
        for weights, initial in zip(stack["weights"], source):
            weights[r].copy_(initial)
        drawn.setdefault(key, r)
        del source      # before the next one is drawn
    of_run = [{name: group for group in replica_groups(run, model, base, roles) for name in group["names"]} for run in runs]
    for key in ("lr", "weight_decay", "eps"):
        stack[key] = [torch.tensor([groups[name][key] for groups in of_run], dtype=dtype, device=device)
                      .view(-1, *[1] * (weights.ndim - 1)) for name, weights in zip(names, stack["weights"])]
    moments = {"sgd": ["first"] if runs[0]["momentum"] else [], "adam": ["first", "second"]}[runs[0]["optimizer"]]
    for moment in moments:
        stack[moment] = [torch.zeros_like(weights) for weights in stack["weights"]]
    return stack


def loss_and_derivative(loss, logits, y):
    """Loss per sample (R, B, ...) and χ = d(sum over replicas of the mean loss)/dlogits (R, B, ..., C), in closed form."""
    samples, index = y[0].numel(), y.unsqueeze(-1)
    if loss == "ce":
        log_p = logits.log_softmax(-1)
        chi = log_p.exp().scatter_(-1, index, -1.0, reduce="add")     # softmax - one-hot
        return -log_p.gather(-1, index).squeeze(-1), chi.div_(samples)
    p = logits.softmax(-1) if loss == "brier" else logits
    error = p.scatter(-1, index, -1.0, reduce="add")
    chi = error * (2 / p.shape[-1] / samples)
    if loss == "brier":
        chi = p * (chi - (p * chi).sum(-1, keepdim=True))       # through the softmax
    return error.square().mean(-1), chi


def stacked_forward(model):
    """forward(weights, x) of any model: logits (R, B, ..., C) of x (R, B, ...)."""
    names = [name for name, _ in model.named_parameters()]
    slots = [(model.get_submodule(path)._parameters, kind) for path, _, kind in (name.rpartition(".") for name in names)]

    def forward(weights, x):
        if len(weights[0]) == 1 and isinstance(model, models.GPT):      # vmap would lose fast attention; an MLP's rows depend on no stack
            for (parameters, kind), w in zip(slots, weights):           # functional_call costs a tenth of a small model's step
                parameters[kind] = w.squeeze(0)
            logits = model(x[0])[None]
        else:
            logits = vmap(lambda weights, x: functional_call(model, dict(zip(names, weights)), (x,)))(tuple(weights), x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))      # losses are never taken in bfloat16

    return forward


def gradients(forward, weights, x, y, loss):
    """Any model: gradients [(R, *shape)], loss per sample (R, B, ...), logits (R, B, ..., C)."""
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        logits = forward(leaves, x)
        per_sample, chi = loss_and_derivative(loss, logits.detach(), y)     # replicas meet nowhere: one backward serves all
        grads = torch.autograd.grad(logits, leaves, chi)
    return grads, per_sample, logits.detach()


def mlp_forward(weights, x, relu):
    """Bias-free MLP: [x, hidden activations ..., logits], each (R, B, width of the layer)."""
    outputs = [x]
    for w in weights:
        outputs.append(torch.bmm(outputs[-1], w.mT))
        if relu and w is not weights[-1]:
            outputs[-1].relu_()
    return outputs


def mlp_gradients(weights, x, y, loss, relu, lr=None, out=None):
    """Bias-free MLP, the textbook backward pass: gradients [(R, *shape)], loss per sample (R, B), logits (R, B, C).

    With lr [(R, 1, 1)] the gradients are not stored: W <- W - lr δᵀh in the product itself, and None is returned. out:
    tensors to hold the gradients; new ones at every step would cost more than AdamW does, in pages that the system clears.
    """
    *inputs, logits = mlp_forward(weights, x, relu)
    per_sample, delta = loss_and_derivative(loss, logits, y)        # δ = dloss/d(W h)
    grads = out or [None] * len(weights)
    for l in reversed(range(len(weights))):
        below = torch.bmm(delta, weights[l]) if l > 0 else None     # with W before its update
        if lr is None:
            grads[l] = torch.bmm(delta.mT, inputs[l], out=grads[l])
        else:
            weights[l].baddbmm_(delta.mul_(lr[l]).mT, inputs[l], alpha=-1)
        if relu and l > 0:
            below = torch.ops.aten.threshold_backward.default(below, inputs[l], 0)
        delta = below
    return (grads if lr is None else None), per_sample, logits


def clip_(grads, largest):
    """Scales each replica's gradients to a joint norm of at most `largest`, as torch.nn.utils.clip_grad_norm_."""
    norms = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.ndim))) for g in grads]       # [(R,)]
    factor = (largest / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, [factor.view(-1, *[1] * (g.ndim - 1)) for g in grads])


def update_(stack, grads, config, factor, step):
    """One step of torch.optim.SGD or AdamW on every replica, using up the gradients; factor is the schedule's, step counts
    from zero."""
    if config["optimizer"] == "adam":
        adamw_ = fused_adamw_ if grads[0].is_cpu else foreach_adamw_
        return adamw_(stack, grads, config, factor, step)
    if config["weight_decay"]:
        torch._foreach_addcmul_(grads, stack["weights"], stack["weight_decay"])
    if config["momentum"]:
        torch._foreach_mul_(stack["first"], config["momentum"])
        torch._foreach_add_(stack["first"], grads)
        grads = stack["first"]
    torch._foreach_addcmul_(stack["weights"], grads, [-factor * lr for lr in stack["lr"]])


def fused_adamw_(stack, grads, config, factor, step):
    """AdamW on every tensor of every replica (R, *shape), by torch's fused kernel: it reads memory once, but takes one LR a
    call, so one call for all that share theirs."""
    if "calls" not in stack:
        stack["calls"] = fused_calls(stack)
    count, grads = torch.tensor(step + 1.0), [g.contiguous().unbind() for g in grads]
    for (lr, decay, eps), members, w, m, v in stack["calls"]:
        torch._fused_adamw_(w, [grads[i][r] for i, r in members], m, v, [], [count] * len(w), lr=factor * lr, beta1=config["beta1"],
                            beta2=config["beta2"], weight_decay=decay, eps=eps, amsgrad=False, maximize=False)


def foreach_adamw_(stack, grads, config, factor, step):
    """The same in a few calls however many replicas there are, each with its own LR."""
    lrs, beta1, beta2 = [factor * lr for lr in stack["lr"]], config["beta1"], config["beta2"]
    w, m, v = stack["weights"], stack["first"], stack["second"]
    root = math.sqrt(1 - beta2 ** (step + 1))
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
    scale = torch._foreach_sqrt(v)
    torch._foreach_add_(scale, torch._foreach_mul(stack["eps"], root))
    if config["weight_decay"]:
        torch._foreach_mul_(w, [1 - a * b for a, b in zip(lrs, stack["weight_decay"])])
    torch._foreach_addcmul_(w, torch._foreach_div(m, scale), [-a * root / (1 - beta1 ** (step + 1)) for a in lrs])


def fused_calls(stack):
    """[((lr, weight decay, ε), [(tensor, replica)], weights, first and second moments)] of all (tensor, replica) that share those."""
    groups = {}
    for i, values in enumerate(zip(*(stack[key] for key in ("lr", "weight_decay", "eps")))):
        for r, key in enumerate(zip(*(value.flatten().tolist() for value in values))):
            groups.setdefault(key, []).append((i, r))
    return [(key, members, *([stack[kind][i][r] for i, r in members] for kind in ("weights", "first", "second")))
            for key, members in groups.items()]


def schedule(step, config):
    """Factor on every base LR at a step counted from zero: linear warmup, then constant or cosine to a tenth."""
    warmup = warmup_steps(config)
    if step < warmup:
        return (step + 1) / warmup
    if config["decay"] == "none":
        return 1.0
    progress = (step - warmup) / max(1, config["steps"] - warmup - 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def last_tenth(steps):
    """The step from which on losses and accuracies count: rows hold their means over the last tenth."""
    return steps - max(1, steps // 10)


def samples_of(config):
    """Samples of a step, or tokens."""
    return config["batch_size"] * (config["context"] if config["model"] == "gpt" else 1)


CPU_MEMORY = 2 ** 30        # bytes that a stack of several replicas may take on the CPU, one more than its replicas for drawing them


def replica_size(config):
    """(parameters, bytes of memory) of one replica: weights, optimizer state, gradients, activations and batches."""
    if config["model"] == "linear_net":
        return 2, 8 * 6 * config["steps"]       # f and the tangent kernel stand for all weights; trajectories
    model, _, _ = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    plain = not (config["momentum"] or config["weight_decay"] or config["clip"] or config["model"] == "gpt")
    copies = {"sgd": 1 if plain else 3, "adam": 6}[config["optimizer"]] + (config["accumulate"] > 1)
    floats = copies * parameters + samples_of(config) // config["accumulate"] * 3 * sum(sum(p.shape) for p in model.parameters())
    return parameters, floats * (8 if config["dtype"] == "float64" else 4)


def stacks(runs, device="cpu", size="auto", shares=1):
    """Groups configurations into lists that `train` can take, each of at most `size` runs, enough of them for `shares` ranks.

    auto: on the CPU as many replicas as keep their weights in the cores' own caches, 2 MB of them for each thread or one
    replica, at most 64 in all and no more than fit into CPU_MEMORY; but one GPT, where stacked attention loses. On CUDA as many
    as fit into half of the free memory, at most 256. One at least.
    """
    groups = {}
    for run in runs:
        shared = tuple(run[name] for name in SETTINGS if name not in PER_REPLICA)
        groups.setdefault((*shared, run["weight_decay"] > 0), []).append(run)      # decay takes another path, with other rounding
    for group in groups.values():
        parameters, memory = replica_size(group[0])
        unit = 1
        if size != "auto":
            limit = size
        elif torch.device(device).type == "cuda":
            limit = min(256, torch.cuda.mem_get_info(device)[0] // 2 // memory)
        else:
            threads = torch.get_num_threads()       # they share a stack's products out by replicas
            limit = 1 if group[0]["model"] == "gpt" else min(64, CPU_MEMORY // memory - 1, threads * max(1, 2 ** 19 // parameters))
            unit = threads if limit >= threads else 1
        units, most = math.ceil(len(group) / unit), max(1, limit // unit)
        parts = max(math.ceil(units / most), min(shares, units))
        bounds = [min(len(group), unit * (units * i // parts)) for i in range(parts + 1)]       # of equal size, to one unit
        yield from (group[a:b] for a, b in zip(bounds, bounds[1:]))


# ------------------------------------------------------------------------------------------------------------------
# Training

VALIDATION = ("val_loss", "val_accuracy", "logit_rms", "val_ece")


def data_order(seeds, size, config, device):
    """Sample indices (seeds, steps, B), drawn from each seed alone: every width and LR sees the same batches."""
    def draw(seed):
        generator = torch.Generator().manual_seed(seed + 1)     # apart from the initialization's
        return torch.randint(size, (config["steps"], config["batch_size"]), generator=generator)
    return torch.stack([draw(seed) for seed in seeds]).to(device)


def batch(splits, index, context):
    """(x, y) of samples index (R, B): rows of the data, or windows of text that begin at those tokens and the tokens after."""
    if splits.y is not None:
        return F.embedding(index, splits.x), splits.y[index]                    # (R, B, D), (R, B); x[index] takes twice as long
    windows = splits.x.windows(index, context + 1)                              # (R, B, T + 1)
    device = splits.x_val.device
    windows = windows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else windows
    return windows[..., :-1], windows[..., 1:]


def average_(tensors):
    """Averages tensors over the ranks of torch.distributed, in place, as one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def optimizer_step(config, model, ranks=1):
    """(advance, forward) for a stack of this configuration.

    advance(stack, x, y, step) makes one optimizer step in place and returns [mean loss (R,)] before it, of all ranks' shares
    of the batch; from `last_tenth` on [mean loss, accuracy]. forward(weights, x) -> logits. The bias-free MLP takes the
    written-out backward pass, with plain SGD fused into it; everything else goes through autograd.
    """
    relu, loss, parts = config["activation"] == "relu", config["loss"], config["accumulate"]
    by_hand = config["model"] == "mlp" and not config["bias"] and config["dtype"] != "bfloat16"
    fused = by_hand and config["optimizer"] == "sgd" and parts == ranks == 1 and not (
        config["momentum"] or config["weight_decay"] or config["clip"])

    general = None if by_hand else stacked_forward(model)

    def forward(weights, x):
        return mlp_forward(weights, x, relu)[-1] if by_hand else general(weights, x)

    def advance(stack, x, y, step):
        factor, total, values = schedule(step, config), None, []
        for x, y in zip(x.chunk(parts, 1), y.chunk(parts, 1)):
            if by_hand:
                lr = (stack["lr"] if factor == 1 else [factor * lr for lr in stack["lr"]]) if fused else None
                if not fused and "grads" not in stack:
                    stack["grads"] = [torch.empty_like(w) for w in stack["weights"]]
                out = stack["grads"] if not fused and total is None else None
                grads, per_sample, logits = mlp_gradients(stack["weights"], x, y, loss, relu, lr, out)
            else:
                grads, per_sample, logits = gradients(general, stack["weights"], x, y, loss)
            per_sample = [per_sample, logits.argmax(-1) == y] if step >= last_tenth(config["steps"]) else [per_sample]
            values.append([value.to(logits.dtype).flatten(1).mean(1) for value in per_sample])
            total = grads if total is None or fused else [a.add_(b) for a, b in zip(total, grads)]
        means = [torch.stack(value).mean(0) for value in zip(*values)] if parts > 1 else values[0]
        if not fused:
            if parts > 1:
                torch._foreach_div_(total, parts)
            if ranks > 1:
                average_([*total, *means])
            if config["clip"]:
                clip_(total, config["clip"])
            update_(stack, total, config, factor, step)
        return means

    return advance, forward


def first_divergence(losses, weights):
    """Per replica, the first row of losses (steps, R) that is not finite, a last row standing for the weights; else -1.

    weights: [(R, *shape)] after the last step of a run, whose last update shows in no loss; else empty.
    """
    bad = ~losses.isfinite()
    if weights:
        bad = torch.cat([bad, torch.stack([~w.flatten(1).isfinite().all(1) for w in weights]).any(0)[None]])
    return torch.where(bad.any(0), bad.int().argmax(0), -1)


def train(runs, splits=None, device="cpu", data_dir=None, progress=None, track=0, tracked=None, checkpoint=None, every=0):
    """Trains runs as one stack and returns one row (dict) per run, in their order.

    runs: dicts of SETTINGS, missing ones at their defaults; within a stack only PER_REPLICA may differ. splits as from
    load_data or load_text, loaded if absent. progress(step, replicas still training) is called now and then. track = N
    appends measurements of every module to the list `tracked` (see `tracker`): of each of the first twenty steps, then of
    every N-th and the last. checkpoint: a path, written every so many steps; if it is there, training goes on from it.
    Where torch.distributed is initialized, every rank takes an equal share of each batch.

    A row holds the configuration, its id, results (final_train_loss and train_accuracy over the last tenth of the steps,
    val_loss, val_accuracy, logit_rms, val_ece on the validation samples, chance_loss, diverged_at) and provenance. A run that
    diverged has diverged_at = the first step, from zero, whose loss is not finite (steps, if only the last update blew
    up), and null results. ValueError on bad settings, or runs that cannot share a stack.
    """
    start = time.perf_counter()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    runs, config, splits, samples = prepare(runs, splits, device, data_dir, ranks)
    if config["model"] == "linear_net":
        if track:
            raise ValueError("linear_net has no modules to track; use --track 0, or --model mlp --activation identity")
        return linear_net_rows(runs, splits, device, start)
    model, base, roles = build(config)
    advance, forward = optimizer_step(config, model, ranks)
    dtype = weight_dtype(config)
    stack = stack_runs(runs, model, base, roles, device, dtype)
    measure = tracker(runs, model, stack["weights"], splits, config, tracked) if track else None
    seeds = sorted({run["seed"] for run in runs})
    order_device = "cpu" if splits.y is None else splits.x.device                       # text is read on the CPU
    order = data_order(seeds, samples, config, order_device)[..., rank::ranks]          # (seeds, steps, B / ranks)
    order_of = torch.tensor([seeds.index(run["seed"]) for run in runs], device=order.device)
    losses = torch.full((config["steps"], len(runs)), math.nan, dtype=dtype, device=device)
    hits = torch.zeros_like(losses)
    diverged_at = [None] * len(runs)
    check_every = 5 if torch.device(device).type == "cpu" else 25       # a check waits for the device
    checked, steps, alive = 0, config["steps"], torch.arange(len(runs), device=device)  # replicas still training
    if checkpoint and checkpoint.exists():
        saved = load_checkpoint(checkpoint, [run_id(run) for run in runs], device)
        checked, stack, alive, diverged_at = (saved[key] for key in ("done", "stack", "alive", "diverged_at"))
        losses[:checked], hits[:checked], order_of = saved["losses"], saved["hits"], order_of[alive.to(order_of.device)]
        if track:
            tracked[:] = saved["tracked"]

    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, config["dtype"] == "bfloat16", cache_enabled=False):
        for step in range(checked, steps):
            x, y = batch(splits, order[order_of, step], config["context"])
            for record, values in zip((losses, hits), advance(stack, x, y, step)):
                record[step, alive] = values
            done, last = step + 1, step + 1 == steps
            if track and (done <= 20 or done % track == 0 or last):
                measure(done, alive, stack["weights"])
            if last or done % check_every == 0 or (every and done % every == 0):
                first = first_divergence(losses[checked:done, alive], stack["weights"] if last else [])
                stays = first < 0
                if not stays.all():
                    for replica, offset in zip(alive[~stays].tolist(), first[~stays].tolist()):
                        diverged_at[replica] = checked + offset
                    alive, order_of = alive[stays], order_of[stays.to(order_of.device)]
                    stack = {key: tensors for key, tensors in stack.items() if key not in SCRATCH}
                    for tensors in stack.values():
                        for i, tensor in enumerate(tensors):        # one by one: never the whole stack twice
                            tensors[i] = tensor[stays]
                checked = done
                if progress:
                    progress(done, len(alive))
                if len(alive) == 0:
                    break
                if checkpoint and done % every == 0 and not last and rank == 0:
                    state = {key: tensors for key, tensors in stack.items() if key not in SCRATCH}
                    save_checkpoint(checkpoint, {"ids": [run_id(run) for run in runs], "done": done, "stack": state, "losses": losses[:done],
                                                 "hits": hits[:done], "alive": alive, "diverged_at": diverged_at, "tracked": tracked})
        finals = dict.fromkeys(range(len(runs)), dict.fromkeys(VALIDATION))
        if len(alive):
            chunk = max(config["batch_size"] // config["accumulate"], 2048 // config["context"]) if config["model"] == "gpt" else 256
            values = evaluate(lambda x: forward(stack["weights"], x.expand(len(alive), *x.shape)), splits, config["loss"], len(alive), chunk)
            finals.update(zip(alive.tolist(), values))
    seconds = round((time.perf_counter() - start) / len(runs), 4)
    return finished_rows(runs, losses, hits, finals, diverged_at, splits, {**provenance(device), "seconds": seconds}, ranks)


def prepare(runs, splits, device, data_dir, ranks):
    """(full configurations, what the stack shares, data, number of training samples); ValueError as train says."""
    runs = [configure(run) for run in runs]
    for name in runs[0]:
        if name not in PER_REPLICA and any(run[name] != runs[0][name] for run in runs):
            raise ValueError(f"runs of one stack must share {name}; only {', '.join(PER_REPLICA)} may differ")
    splits = load_splits(runs[0], data_dir, device) if splits is None else splits
    if runs[0]["model"] == "gpt":
        runs = [dict(run, vocab_size=splits.classes) for run in runs]
    config = dict(runs[0], weight_decay=max(run["weight_decay"] for run in runs))
    samples, size = len(splits.x) - (0 if splits.y is not None else config["context"]), config["batch_size"]
    if size > samples and config["model"] != "linear_net":
        raise ValueError(f"batch_size is {size}; it must be at most the {samples} training samples")
    if size % (ranks * config["accumulate"]):
        raise ValueError(f"batch_size is {size}; it must be a multiple of {ranks} ranks times accumulate = {config['accumulate']}")
    return runs, config, splits, samples


def finished_rows(runs, losses, hits, finals, diverged_at, splits, origin, ranks=1):
    """The rows of runs from losses and hits (steps, R), finals {replica: validation} and diverged_at [step or None]."""
    config, late = runs[0], slice(last_tenth(len(losses)), None)
    columns = {"final_train_loss": losses[late].T.tolist(), "train_accuracy": hits[late].T.tolist()}
    stacked_gpt = config["model"] == "gpt" and len(runs) > 1            # attention differs under vmap
    deterministic = origin["deterministic"] and ranks == 1 and not stacked_gpt
    shared = {"failed": None, "chance_loss": chance_loss(config["loss"], splits.x if splits.y is None else splits.y, splits.classes),
              **origin, "deterministic": deterministic}
    return [{"id": run_id(run), **run,
             **{name: math.fsum(column[r]) / len(column[r]) if diverged_at[r] is None else None for name, column in columns.items()},
             **finals[r], "diverged_at": diverged_at[r], **shared} for r, run in enumerate(runs)]


def failed_row(run, reason, device):
    """The row of a run that could not be trained at all."""
    nothing = dict.fromkeys(("final_train_loss", "train_accuracy", *VALIDATION, "diverged_at"))
    return {"id": run_id(run), **run, **nothing, "failed": reason, "chance_loss": None, **provenance(device), "seconds": 0.0}


def save_checkpoint(path, state):
    """Writes whole or not at all. The data order is no part of it: it follows from the seed and the step."""
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:       # how torch says that the disk is full
            raise OSError(f"{path} could not be written; make room, or train without --checkpoint") from error


def load_checkpoint(path, ids, device):
    """What save_checkpoint wrote for the runs of these ids. ValueError if it is damaged or belongs to other runs."""
    with open(path, "rb") as file:
        try:
            state = dict(torch.load(file, map_location=device, weights_only=True))
            if state["ids"] == ids:
                return {key: state[key] for key in ("done", "stack", "losses", "hits", "alive", "diverged_at", "tracked")}
        except (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, pickle.UnpicklingError):
            raise ValueError(f"{path} is damaged; remove it to begin that run anew") from None
    raise ValueError(f"{path} belongs to another run; remove it, or use another --out")


def linear_net_rows(runs, splits, device, start):
    """The rows of a stack of linear_net runs, computed on the CPU; what has no meaning for one sample is null."""
    results, config = {}, runs[0]
    for parameterization, alpha in dict.fromkeys((run["param"], run["alpha"]) for run in runs):
        chosen = [r for r, run in enumerate(runs) if (run["param"], run["alpha"]) == (parameterization, alpha)]
        lr, seed, weight_decay = ([runs[r][name] for r in chosen] for name in ("lr", "seed", "weight_decay"))
        path = models.linear_net(config["width"], lr, config["steps"], parameterization, seed, alpha, config["base_width"],
                                 splits.x.item(), splits.y.item(), weight_decay, lambda step: schedule(step, config),
                                 config["label_noise"])
        losses = finite(path.loss[last_tenth(config["steps"]):-1].mean(0).tolist())          # as elsewhere, the losses before each step
        for r, loss, step in zip(chosen, losses, path.diverged_at.tolist()):
            results[r] = {"final_train_loss": loss if step < 0 else None, "diverged_at": step if step >= 0 else None}
    shared = {**dict.fromkeys(("train_accuracy", *VALIDATION, "failed")),
              "chance_loss": splits.y.item() ** 2 / 2, **provenance(device),        # of the initial readout's mean, 0
              "seconds": round((time.perf_counter() - start) / len(runs), 4)}
    return [{"id": run_id(run), **run, **results[r], **shared} for r, run in enumerate(runs)]


def tracker(runs, model, initial, splits, config, tracked):
    """measure(step, alive, weights): appends to `tracked` what metrics.py says of every replica after `step` updates.

    One dict per run, step and module: id, step, module, layer (from 0, in the model's order), the norms of the refined
    coordinate check, alignments, layer statistics and gradient norm; and one for the logits, module "": loss, rms,
    change (rms), margin, chi, and after the last step the softmax outputs. All on the first batch_size validation
    samples, the same for every run; null where a value is undefined or not finite.
    """
    names = [name for name, _ in model.named_parameters()]
    x, y = splits.x_val[:config["batch_size"]], splits.y_val[:config["batch_size"]]

    def load(module, weights, r):
        module.load_state_dict({name: w[r] for name, w in zip(names, weights)}, assign=True)
        return module

    def loss_fn(logits, y):
        return LOSSES[config["loss"]](logits, y).mean()

    initial = [w.clone() for w in initial]
    module = copy.deepcopy(model)       # takes each replica's weights in turn
    ids, reference_norms, references, initial_logits = [run_id(run) for run in runs], [{} for _ in runs], [], []
    with torch.no_grad():
        for r in range(len(runs)):
            references.append(metrics.capture(load(module, initial, r), x))
            initial_logits.append(module(x))

    @torch.autocast(x.device.type, enabled=False)
    def measure(step, alive, weights):
        for position, r in enumerate(alive.tolist()):
            key = {"id": ids[r], "step": step}
            layers = metrics.updates(load(module, weights, position), references[r], x)
            per_module = [metrics.refined_coordinate_check(module, references[r], x, layers),
                          metrics.alignment(module, references[r], x, layers, reference_norms[r]),
                          metrics.layer_statistics(module, references[r], x, layers)]
            with torch.enable_grad():
                logits = module(x)
                loss = loss_fn(logits, y)
                gradient = dict(zip(names, torch.autograd.grad(loss, list(module.parameters()))))
            for layer, name in enumerate(layers):
                values = {k: v for part in per_module for k, v in part[name].items()}
                values["gradient"] = gradient[f"{name}.weight"].norm().item()
                tracked.append({**key, "module": name, "layer": layer, **finite(values)})
            logits = logits.detach()
            change = (logits - initial_logits[r]).square().mean(-1).sqrt().mean()
            whole = {"loss": loss.item(), "change": change.item(), **metrics.logit_statistics(logits, y, loss_fn)}
            outputs = {"softmax": [finite(p) for p in logits.softmax(-1).tolist()]} if step == config["steps"] and y.ndim == 1 else {}
            tracked.append({**key, "module": "", "layer": len(layers), **finite(whole), **outputs})

    return measure


def finite(values):
    """The same dict or list with null (None) where a number is not finite: strict JSON."""
    if isinstance(values, dict):
        return dict(zip(values, finite(list(values.values()))))
    return [value if math.isfinite(value) else None for value in values]


def evaluate(forward, splits, loss, replicas, chunk=256):
    """[{val_loss, val_accuracy, logit_rms, val_ece}] per replica; logit_rms is the RMS over classes, averaged over samples;
    val_ece, the expected calibration error, is null for text."""
    sums, kept = torch.zeros(3, replicas, dtype=torch.float64, device=splits.x_val.device), []
    for x, y in zip(splits.x_val.split(chunk), splits.y_val.split(chunk)):
        logits = forward(x)                                                 # (R, chunk, ..., C)
        kept += [logits] if y.ndim == 1 else []
        y = y.expand(replicas, *y.shape)
        per_sample = LOSSES[loss](logits, y), logits.argmax(-1) == y, logits.square().mean(-1).sqrt()
        sums += torch.stack([values.double().flatten(1).sum(1) for values in per_sample])
    errors = [metrics.expected_calibration_error(logits, splits.y_val) for logits in torch.cat(kept, 1)] if kept else [math.nan] * replicas
    means = (sums / splits.y_val.numel()).T.tolist()
    return [dict(zip(VALIDATION, finite([*row, error]))) for row, error in zip(means, errors)]


@functools.cache
def provenance(device):
    """Where a row comes from: versions, device, git commit of this file (with "+" if the tree was changed), and
    whether the same run gives the same bits here whatever shares its stack: MKL promises it on the CPU (where this file came
    before torch), CUDA does not."""
    def git(*command):
        try:
            return subprocess.run(("git", *command), cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = "+" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return {"python": platform.python_version(), "torch": torch.__version__, "device": name,
            "commit": commit + changed if commit else None, "deterministic": kind == "cpu" and torch.backends.mkl.is_available() and SAME_BITS}


def lines_of(rows):
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def append_rows(path, rows):
    """Appends whole lines, and returns once they are on the disk."""
    with open(path, "a") as file:
        file.write(lines_of(rows))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path):
    """A binary file that comes to stand under its name whole and on the disk, or not at all."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------------
# Speed, against the matrix products alone

class Products(TorchDispatchMode):
    """Keeps the matrix products called under it, (operation, arguments), so that they can be called again alone."""
    calls = ()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_"):
            self.calls += (functools.partial(op, *args, **(kwargs or {})),)
        return op(*args, **(kwargs or {}))


def bench(config, size, device, data_dir=None):
    """(replicas, seconds a step of the stack, the part of them that its matrix products take alone, floating-point
    operations a step); of ten repetitions the smallest, and the median ratio of neighbours. LRs are tiny: nothing diverges."""
    splits = load_splits(config, data_dir, device)
    config = dict(config, vocab_size=splits.classes if config["model"] == "gpt" else 0)
    runs = next(stacks([dict(config, lr=1e-9)] * 256, device, size))
    model, base, roles = build(config)
    advance, _ = optimizer_step(config, model)
    stack = stack_runs(runs, model, base, roles, device, weight_dtype(config))
    x, y = batch(splits, torch.arange(config["batch_size"]).expand(len(runs), -1), config["context"])

    def seconds(call, repeats=1):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    def step():
        advance(stack, x, y, 0)

    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, config["dtype"] == "bfloat16", cache_enabled=False):
        with Products() as products:
            step()
        repeats = math.ceil(0.1 / min(seconds(step) for _ in range(3)))
        times = [(seconds(step, repeats), seconds(lambda: [call() for call in products.calls], repeats)) for _ in range(10)]
    operations = sum(2 * call.args[-2].numel() * call.args[-1].shape[-1] for call in products.calls)
    return len(runs), min(times)[0], sorted(alone / whole for whole, alone in times)[5], operations


def bench_table(configs, size, device, data_dir):
    """Prints a stack's speed at each width, as Markdown. ValueError for linear_net, which multiplies no matrices."""
    print("| width | stack | steps/s | ms per run and step | GFLOP/s | of the products alone |\n|---:|---:|---:|---:|---:|---:|")
    for config in configs:
        if config["model"] == "linear_net":
            raise ValueError("linear_net multiplies no matrices; --bench takes --model mlp or gpt")
        replicas, seconds, products, operations = bench(config, size, device, data_dir)
        print(f"| {config['width']} | {replicas} | {1 / seconds:.1f} | {1e3 * seconds / replicas:.3f} | {operations / seconds / 1e9:.0f} "
              f"| {products:.2f} |", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and flags spelled out."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser, several=(), without=()):
    """A flag for every setting, None where it is not given, but for those in `without`; those in `several` take a list.
    Then what both scripts share."""
    group = parser.add_argument_group("settings of a run")
    for name, (default, kind, text) in SETTINGS.items():
        others = "".join(f"; {model} {optimizer}: {values[name]}" for (model, optimizer), values in DEFAULTS.items() if name in values)
        flag, default = "--" + name.replace("_", "-"), f" (default {default}{others})".replace("%", "%%")
        if kind is FLAG:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text + default)
        elif name not in without:
            words = f"{text}: {kind.words}".replace("%", "%%") + default
            group.add_argument(flag, type=kind.type, metavar={str: "NAME", int: "N", float: "X"}[kind.type], help=words,
                               nargs="+" if name in several else None)
    group = parser.add_argument_group("measurements and machine")
    group.add_argument("--track", type=int, default=0, metavar="N",
                       help="measure every module in the first 20 steps, then every N-th, into track*.jsonl of --out; 0 is never (default 0)")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data files (default $DATA_DIR, ./data)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; under torchrun each rank takes its own (default auto)")


def choose_device(name):
    """torch device name; auto takes CUDA where there is one. Under torchrun, ranks of a node take its CUDA devices in turn.
    ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    kind, _, index = name.partition(":")
    if name not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there ({torch.cuda.device_count()} CUDA devices); use --device auto")
    return name


def command_line(main):
    """Runs main; bad input ends with one line on standard error and exit code 2, an interrupt with 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{Path(sys.argv[0]).name}: out of memory; use a smaller width, batch size, number of steps or --stack", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'interrupted; the same command goes on'}", file=sys.stderr)
        sys.exit(130)


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "Storage size calculation overflowed")))


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {path}, which cannot be made a folder ({error.strerror}); name another with --out") from None


def main():
    parser = Parser(description="Train one network and print its result row as JSON. Under torchrun: data-parallel.")
    add_flags(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, metavar="DIR", help="also write the row to DIR/runs-ID.jsonl; a run found there is not run again")
    group.add_argument("--checkpoint", type=int, default=0, metavar="N",
                       help="every N steps write all that is needed to go on to DIR/checkpoint-ID.pt; 0 is never (default 0)")
    group = parser.add_argument_group("speed")
    group.add_argument("--bench", type=int, nargs="*", metavar="WIDTH", help="train nothing: print the speed of a stack of such "
                       "runs at these widths (default --width), against its matrix products alone")
    group.add_argument("--stack", type=lambda n: n if n == "auto" else int(n), default="auto", metavar="N",
                       help="most replicas in the stack of --bench (default auto)")
    args = vars(parser.parse_args())
    device, data_dir, out, track, every, widths, stack = (
        args.pop(name) for name in ("device", "data_dir", "out", "track", "checkpoint", "bench", "stack"))
    config, tracked, device = configure({name: value for name, value in args.items() if value is not None}), [], choose_device(device)
    for name, value in (("track", track), ("checkpoint", every)):
        if value < 0 or (value and not out):
            raise ValueError(f"{name} is {value}; it must be at least 0, and needs a folder to write to: --out DIR")
    if stack != "auto" and stack < 1:
        raise ValueError(f"stack is {stack}; it must be auto or a whole number, at least 1")
    if widths is not None:
        return bench_table([configure(dict(config, width=width)) for width in widths or [config["width"]]], stack, device, data_dir)
    splits = load_splits(config, data_dir, device)
    if config["model"] == "gpt":
        config["vocab_size"] = splits.classes
    if out:
        make_folder(out)
    file, tracks, checkpoint = (out and out / name.format(run_id(config)) for name in ("runs-{}.jsonl", "track-{}.jsonl", "checkpoint-{}.pt"))
    if file and file.exists():
        print(f"{file} is there: not run again", file=sys.stderr)
        return print(file.read_text(), end="")

    leader = True
    if "TORCHELASTIC_RUN_ID" in os.environ:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        leader = torch.distributed.get_rank() == 0

    def progress(step, alive):
        if leader and (sys.stderr.isatty() or step == config["steps"]):
            print(f"\rstep {step}/{config['steps']}", end="", file=sys.stderr, flush=True)

    try:
        row, = train([config], splits, device, None, progress, track, tracked, checkpoint if every else None, every)
    except KeyboardInterrupt:
        from_where = f"goes on from {checkpoint}" if every and checkpoint.exists() else "begins anew (--checkpoint N would keep what is done)"
        raise KeyboardInterrupt(f"interrupted; the same command {from_where}") from None
    if leader:
        print("" if row["diverged_at"] is None else f"\ndiverged at step {row['diverged_at']}", file=sys.stderr)
        for path, rows in ((tracks, tracked), (file, [row])):       # the row last: it says that the run is done
            if out and rows:
                with whole_file(path) as target:
                    target.write(lines_of(rows).encode())
        if out:
            checkpoint.unlink(missing_ok=True)
        print(json.dumps(row, allow_nan=False))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command_line(main)

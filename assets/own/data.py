"""Data of your own for `--data assets/own/data.py:FUNCTION`: each function returns
(x, y), or (x, y, x_val, y_val), of numpy or torch."""
import numpy as np


def table():
    """A table of 40 features and two classes."""
    x = np.random.default_rng(0).standard_normal((20_000, 40)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).astype(np.int64)


def noisy_labels():
    """The same with a tenth of the labels drawn at random."""
    x, y = table()
    generator = np.random.default_rng(1)
    noisy = generator.random(len(y)) < 0.1
    return x, np.where(noisy, generator.integers(0, 2, len(y)), y)


def real_valued():
    """The same features with real-valued targets (N, 1), for --loss mse huber."""
    x, _ = table()
    return x, (x[:, :1] * x[:, 1:2] + x[:, 2:3]).astype(np.float32)

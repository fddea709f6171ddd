from torch import nn


def build(width, shape):
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, width, 3, stride=2), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, shape.outputs))

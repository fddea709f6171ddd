"""The 8-layer MLP whose input is divided by sqrt(D) and whose first layer starts sqrt(D)
times larger: the same function, but an update of the first layer moves it D times less.

The input layer of an ordinary MLP moves as lr D n^-1/2, a hidden one as lr n^1/2: on
images of D = 784 pixels the input layer moves more up to width 784.
"""
import math

from torch import nn


class ScaledInput(nn.Module):
    def __init__(self, inputs, width, outputs, hidden_layers=7):
        super().__init__()
        sizes = [inputs] + [width] * hidden_layers + [outputs]
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=False) for fans in zip(sizes, sizes[1:]))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        self.factor = math.sqrt(inputs)
        nn.init.normal_(self.layers[0].weight, std=math.sqrt(2))

    def forward(self, x):                               # (B, inputs) -> (B, outputs)
        x = x / self.factor
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def build(width, shape):
    return ScaledInput(shape.inputs, width, shape.outputs)

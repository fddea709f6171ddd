"""Networks whose width is the only thing that grows.

    MLP     the ReLU network of arXiv 2505.22491: no biases by default, flattened input, logits out

Initial weights are those of nn.Linear until `param.init_` draws them; build on the meta device to skip the first draw.
Needs torch only and can be copied alone.

    model = MLP(784, width=512, hidden_layers=3, d_out=10)
"""
import torch
import torch.nn as nn

ACTIVATIONS = {"relu": torch.relu, "identity": lambda x: x}


class MLP(nn.Module):
    """d_in -> width -> ... -> width -> d_out with `hidden_layers` hidden activations; x (B, ...) -> logits (B, d_out).

    hidden_layers = 1 is the "2-layer MLP", 7 the paper's 8-layer MLP. activation "identity" gives the deep linear net.
    ValueError on an unknown activation or a size below one.
    """

    def __init__(self, d_in, width, hidden_layers, d_out, activation="relu", bias=False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        if min(sizes) < 1 or hidden_layers < 1:
            raise ValueError(f"MLP sizes must be at least one: d_in {d_in}, width {width}, hidden_layers {hidden_layers}, d_out {d_out}")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in zip(sizes, sizes[1:]))

    def forward(self, x):
        x = x.flatten(1)                                    # (B, d_in)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))      # (B, width)
        return self.layers[-1](x)                           # (B, d_out)

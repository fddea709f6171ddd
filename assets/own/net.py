from torch import nn


class Net(nn.Module):
    def __init__(self, inputs, width, classes):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):                               # (B, inputs) -> (B, classes)
        x = self.embed(x)
        return self.readout(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))


def build(width, shape):
    return Net(shape.inputs, width, shape.outputs)

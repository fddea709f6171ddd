"""Speed of a stack of runs, against its matrix products alone, as a Markdown table.

    python tests/bench.py 64 256 1024                   # at these widths; --stack 1: one run alone
    python tests/bench.py --model gpt --optimizer adam --device cuda

Learning rates are tiny, so that nothing diverges. The fastest step of ten repetitions counts. The share of
the products is the median ratio of their time, when they are called again alone, to that of the steps beside
them.
"""
import os
if __name__ == "__main__":      # as sweep.py does, before torch loads MKL
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import functools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config as settings
import stack
import sweep
import train


HEAD = """\
| width | stack | steps/s | ms per run and step | GFLOP/s | of the products alone |
|---:|---:|---:|---:|---:|---:|
"""


class Products(TorchDispatchMode):
    """Keeps the matrix products called under it, so that they can be called again alone."""
    calls = ()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_"):
            self.calls += (functools.partial(op, *args, **(kwargs or {})),)
        return op(*args, **(kwargs or {}))


def bench(run, size, device, data_dir):
    """Return (replicas, seconds a step of all of them, share of its matrix products, their operations)."""
    batch, config, splits = train.prepare(dict(run, lr=1e-9), None, device, data_dir)
    shape = train.shape_of(config, splits)
    batch = next(sweep.stacks(batch * 256, shape, device, size))
    template, roles, _ = train.build(config, shape, device)
    replicas, rule = train.make_replicas(batch, template, roles, splits, device), train.rule_of(config)
    samples = torch.arange(config["batch_size"], device=train.index_device(splits))
    x, y = splits.batch(samples.expand(len(batch), -1))
    model = train.stacked_model(config, template, replicas, x, y)

    def step():
        stack.advance(replicas, x, y, model, rule, parts=config["accumulate"])

    def alone():
        for call in products.calls:
            call()

    def seconds(call, repeats=1):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    with torch.no_grad(), train.precision(config, device):
        with Products() as products:
            step()
        repeats = math.ceil(0.1 / min(seconds(step) for _ in range(3)))
        times = [(seconds(step, repeats), seconds(alone, repeats)) for _ in range(10)]
    share = sorted(part / whole for whole, part in times)[5]
    operations = sum(2 * call.args[-2].numel() * call.args[-1].shape[-1] for call in products.calls)
    return len(batch), min(times)[0], share, operations


def main(argv=None):
    parser = settings.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=settings.whole_number, nargs="*", metavar="WIDTH",
                        help="widths (default --width)")
    parser.add_argument("--stack", default="auto", metavar="N", help="most replicas at once (default auto)")
    settings.add_flags(parser, without=("lr", "seed"))
    args = vars(parser.parse_args(argv))
    device = settings.choose_device(args["device"])
    size = settings.checked("stack", args["stack"], sweep.CHECKS["stack"])
    if args["track"]:
        raise settings.InputError("--track measures a run; use train.py or sweep.py")
    size = size if size == "auto" else int(size)
    run = settings.settings_of_flags(args)
    widths = args["widths"] or [settings.configure(run)["width"]]
    runs = [settings.configure({**run, "width": width}) for width in widths]
    for i, run in enumerate(runs):
        replicas, step, share, operations = bench(run, size, device, args["data_dir"])
        print("" if i else HEAD, end="")
        print(f"| {run['width']} | {replicas} | {1 / step:.1f} | {1e3 * step / replicas:.3f} "
              f"| {operations / step / 1e9:.0f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    settings.command_line(main)

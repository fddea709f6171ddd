"""Speed of a stack of runs, against its matrix products alone, as a Markdown table.

    python tests/bench.py 64 256 1024                   # at these widths; --stack 1: one run alone
    python tests/bench.py --model gpt --optimizer adam --device cuda

Learning rates are tiny, so that nothing diverges. Of ten repetitions the fastest step counts; the share of
the products is the median ratio of their time, called again alone, to that of the steps beside them.
"""
import functools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train        # before torch: it fixes how MKL sums
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stack
import sweep


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


def bench(config, size, device, data_dir):
    """(replicas, seconds a step of all of them, share of its matrix products, operations of those)."""
    runs, config, splits = train.prepare([dict(config, lr=1e-9)], None, device, data_dir, ranks=1)
    runs = next(sweep.stacks(runs * 256, device, size))
    model, base, roles = train.build(config)
    network, rule = train.network_of(config, model), train.rule_of(config)
    replicas = train.stack_of(runs, model, base, roles, device, train.weight_dtype(config))
    x, y = splits.batch(torch.arange(config["batch_size"]).expand(len(runs), -1))

    def step():
        stack.advance(replicas, x, y, network, rule, parts=config["accumulate"])

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
    return len(runs), min(times)[0], share, operations


def main():
    parser = train.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="*", metavar="WIDTH", help="widths (default --width)")
    parser.add_argument("--stack", default="auto", metavar="N", help="most replicas at once (default auto)")
    train.add_flags(parser, without=("lr", "seed"))
    args = vars(parser.parse_args())
    size, device = args["stack"], train.choose_device(args["device"])
    if size != "auto" and not (size.isdecimal() and int(size)):
        raise train.InputError(f"stack is {size!r}; it must be auto or a whole number, at least 1")
    if args["track"]:
        raise train.InputError("--track measures a run; use train.py or sweep.py")
    size = size if size == "auto" else int(size)
    given = train.settings_given(args)
    widths = args["widths"] or [train.configure(given)["width"]]
    configs = [train.configure({**given, "width": width}) for width in widths]
    for i, config in enumerate(configs):
        replicas, step, share, operations = bench(config, size, device, args["data_dir"])
        print("" if i else HEAD, end="")
        print(f"| {config['width']} | {replicas} | {1 / step:.1f} | {1e3 * step / replicas:.3f} "
              f"| {operations / step / 1e9:.0f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    train.command_line(main)

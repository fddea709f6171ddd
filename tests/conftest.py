"""What several test files share. Small networks train fastest on one thread, and tests run side by side."""
import os

# MKL reads this when torch loads it. Under it MKL sums in the same order whatever else a stack holds, so that
# a row is the same to the last bit in any stack, as it is from the command lines of train.py and sweep.py.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import contextlib
import io
import sys
from types import SimpleNamespace

import torch

torch.set_num_threads(1)


def call(main, script, *flags):
    """Run main in this process, as the command line of a script would call it.

    Returns an object with returncode, stdout and stderr.
    """
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

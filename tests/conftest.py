"""What several test files share. Small networks are fastest on one thread, and tests run side by side."""
import train        # noqa: F401    before torch: it asks for reproducible products

import contextlib
import io
import sys
from types import SimpleNamespace

import torch

torch.set_num_threads(1)


def call(main, script, *flags):
    """main in this process, as the command line of a script would call it: returncode, stdout, stderr."""
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

"""main_pretrain, its graphs cut but no kernels built for them; compiling a graph a second time is an error."""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import main_pretrain

if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = True
    main_pretrain.main(sys.argv[1:])

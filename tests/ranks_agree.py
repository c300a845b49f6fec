"""main_pretrain under torchrun; at its end the ranks compare student and teacher, and each leaves a file RANK behind.

torchrun --nproc_per_node=2 tests/ranks_agree.py OPTIONS
"""

import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent.parent))

import main_pretrain
from util.ema import EMATeacher
from util.run import loop


def main(options):
    folder = Path(options[options.index("--output_dir") + 1])
    modules = []

    class Watched(EMATeacher):
        def __init__(self, student):
            super().__init__(student)
            modules.extend([student, self.module])

    def compare_and_shut_down():
        own = torch.cat([value.flatten().double() for module in modules for value in module.state_dict().values()])
        all_ranks = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(all_ranks, own)
        assert all(torch.equal(own, other) for other in all_ranks)
        (folder / f"rank-{distributed.get_rank()}").write_text(f"equal to {len(all_ranks)}")
        shutdown()

    main_pretrain.EMATeacher = Watched
    shutdown, loop.shutdown = loop.shutdown, compare_and_shut_down
    main_pretrain.main(options)


if __name__ == "__main__":
    main(sys.argv[1:])

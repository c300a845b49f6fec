"""How far a run is, and by its exit status whether to start it again; for job scripts (recipes/slurm.sh).

    python -m util.run.status output_dir/pretrain_hpm_base_200 output_dir/finetune_hpm_base_200

Of several folders, which one job fills one after the other, the first that is not finished decides:

    0    all are finished: nothing is left to do
    75   a signal ended the run, which is saved: start it again
    1    something is left to do, but no signal ended the run: see its log
    2    no checkpoint can be read
"""

import argparse
import sys
from pathlib import Path

from util.run import checkpoint, options
from util.run.logger import log, setup_logging
from util.run.preemption import EXIT_STATUS


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder: --output_dir/--experiment")
    return parser


def status_of(args: argparse.Namespace) -> int:
    """The exit status, as above.

    Raises:
        ValueError: there are checkpoints in a folder, but none is whole.
    """
    for folder in map(Path, args.folders):
        found = checkpoint.newest(folder)
        if found is None:
            log.info("%s: not begun", folder)
            return 1
        path, state = found
        epoch, step, asked = state["epoch"], state["step"], state["options"]
        log.info("%s: %d of %d epochs and %d of %d steps", path, epoch, asked["epochs"], step, asked["steps_per_epoch"])
        if not checkpoint.is_finished(epoch, step, asked):
            log.info(
                "%s", f"stopped by {state['stopped']}" if state["stopped"] else "not finished, and no signal said so"
            )
            return EXIT_STATUS if state["stopped"] else 1
    return 0


def main(argv: list[str] | None = None) -> int:
    setup_logging(enabled=True)
    with options.user_mistakes():
        return status_of(get_args_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Progress of a run; the exit status says whether to start it again, for job scripts (recipes/slurm.sh).

    python -m util.run.status output_dir/pretrain_hpm_base_200 output_dir/finetune_hpm_base_200

Of several folders, which one job fills one after the other, the first incomplete one decides:

    0    all are complete
    75   a signal stopped the run, which is saved: start it again
    1    incomplete, and the last stop was not by a signal: see its log
    2    no checkpoint can be read, or the newest one is gone
"""

import sys
from pathlib import Path

from util.run import checkpoint, options
from util.run.logger import log, setup_logging
from util.run.watch import EXIT_STATUS


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folder: --output_dir/--experiment")
    return parser


def status_of(folders: list[str]) -> int:
    """The exit status, as above.

    Raises:
        ValueError: there are checkpoints in a folder, but none is complete, or the newest one is gone.
    """
    for folder in folders:
        found = checkpoint.find_resume(Path(folder))
        if found is None:
            log.info("%s: not started", folder)
            return 1
        path, state = found
        asked = state["options"]
        where = f"epoch {state['epoch']}/{asked['epochs']}, step {state['step']}/{asked['steps_per_epoch']}"
        if checkpoint.is_finished(state["epoch"], state["step"], asked):
            log.info("%s: complete (%s)", path, where)
        elif state["stopped"]:
            log.info("%s: incomplete (%s), stopped by %s", path, where, state["stopped"])
            return EXIT_STATUS
        else:
            log.info("%s: incomplete (%s); the last stop was not by a signal", path, where)
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    setup_logging(enabled=True)
    with options.user_mistakes():
        return status_of(get_args_parser().parse_args(argv).folders)


if __name__ == "__main__":
    sys.exit(main())

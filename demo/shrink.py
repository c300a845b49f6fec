"""Keep the weights of a pre-training checkpoint, in half precision, and what describes them: no optimizer, no teacher.

    python -m demo.shrink --checkpoint output_dir/checkpoint-last.pth --output demo/hpm_micro_tiny_imagenet.pth

Encoder, reconstructor and loss predictor take 2 bytes a parameter. Everything that reads a checkpoint reads the file.
"""

from pathlib import Path

import torch

from util.run import options
from util.run.checkpoint import read_run
from util.run.folder import write_file
from util.run.logger import log, setup_logging
from util.weights.load import load_pretrained


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="checkpoint of main_pretrain.py")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--which", choices=["student", "ema"], default="student", help="weights to keep")
    return parser


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        state, output = read_run(args.checkpoint), Path(args.output)
        if state["script"] != "main_pretrain":
            raise ValueError(
                f"{args.checkpoint} was written by {state['script']}: give a checkpoint of main_pretrain.py"
            )
        if output.exists() and output.samefile(args.checkpoint):
            raise ValueError(f"--output {output} is the checkpoint itself: choose another name")
        weights = {name: value.half() for name, value in load_pretrained(args.checkpoint, args.which).items()}
        if broken := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{args.checkpoint}: {broken[0]} does not fit half precision")
        kept = ("format", "version", "script", "model", "epoch", "step", "image")
        content = {name: state[name] for name in kept}
        # Local folders mean nothing to others.
        settings = {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in state["options"].items()}
        write_file(output, {**content, "options": settings, "state_dict": weights})
    log.info("wrote %s: %d tensors, %.2f MB", output, len(weights), output.stat().st_size / 1e6)


if __name__ == "__main__":
    main()

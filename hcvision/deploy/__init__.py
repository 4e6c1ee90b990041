"""What is done with a trained classifier: predictions for image files, and files for timm, ONNX and torch.export."""

from hcvision.deploy.exporting import export
from hcvision.deploy.prediction import predict

__all__ = ["export", "predict"]

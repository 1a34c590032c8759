"""Teaching a small network: differentiable execution of ONNX graphs, distillation. Needs the extra `learn`."""

"""From a PyTorch module to a model of 4-bit weights and 8-bit activations, taught by the module itself."""

import torch
from torch import nn

import featherweight as fw

torch.manual_seed(0)
kinds = torch.randint(0, 10, (3000,))
pictures = torch.rand(10, 1, 12, 12)[kinds] + 0.7 * torch.randn(3000, 1, 12, 12)
convs = [nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for _ in range(160):
    batch = torch.randint(0, 2000, (50,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(pictures[batch]), kinds[batch]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()

data = {"input": pictures[2000:].numpy(), "label": kinds[2000:].numpy()}
small = fw.compress(net, data, max_size="15%", techniques="static_int8", out="small")
print("without a teacher:", small.result.size_bytes, "bytes, accuracy", small.result.metric)
taught = fw.distill("small/source.onnx", "small/model.onnx", data, out="taught", time_budget="30s")
print("taught:", taught.model, "accuracy", taught.after.metric, "of", taught.teacher.metric)

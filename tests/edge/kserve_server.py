"""A KServe model server of one ONNX model, run by a Python that has the package kserve: NAME MODEL PORT."""

import sys

import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer

NAME, PATH, PORT = sys.argv[1:4]
sys.argv[1:] = ["--http_port", PORT]


class Served(Model):
    def __init__(self):
        super().__init__(NAME)
        self.session = onnxruntime.InferenceSession(PATH)
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        values = self.session.run(None, {i.name: i.as_numpy() for i in payload.inputs})
        outputs = []
        for info, value in zip(self.session.get_outputs(), values, strict=True):
            output = InferOutput(name=info.name, shape=list(value.shape), datatype="FP32")
            output.set_data_from_numpy(value, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(response_id=payload.id, model_name=NAME, infer_outputs=outputs)

    async def get_input_types(self):
        return [described(i) for i in self.session.get_inputs()]

    async def get_output_types(self):
        return [described(o) for o in self.session.get_outputs()]


def described(info):
    return {"name": info.name, "datatype": "FP32", "shape": [d if isinstance(d, int) else -1 for d in info.shape]}


ModelServer(http_port=int(PORT), enable_grpc=False, workers=1).start([Served()])

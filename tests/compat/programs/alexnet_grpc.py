import argparse
import io
from typing import Dict

import torch
from kserve_lite.compat import InferRequest, Model, ModelServer, logging, model_server
from kserve_lite.compat.utils.utils import generate_uuid
from PIL import Image
from torchvision import models, transforms


class AlexNetModel(Model):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name
        self.model = None
        self.ready = False

    def load(self):
        self.model = models.alexnet(weights=models.AlexNet_Weights.IMAGENET1K_V1)
        self.model.eval()
        self.ready = True

    def predict(self, payload: InferRequest, headers: Dict[str, str] = None) -> Dict:
        req = payload.inputs[0]
        input_image = Image.open(io.BytesIO(req.data[0]))
        preprocess = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(
                    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
                ),
            ]
        )
        input_batch = preprocess(input_image).unsqueeze(0)
        with torch.no_grad():
            output = self.model(input_batch)
        values, top_5 = torch.topk(torch.nn.functional.softmax(output, dim=1), 5)
        result = values.flatten().tolist()
        return {
            "id": generate_uuid(),
            "model_name": payload.model_name,
            "outputs": [
                {
                    "contents": {"fp32_contents": result},
                    "datatype": "FP32",
                    "name": "output-0",
                    "shape": list(values.shape),
                }
            ],
        }


parser = argparse.ArgumentParser(parents=[model_server.parser])
args, _ = parser.parse_known_args()

if __name__ == "__main__":
    logging.configure_logging(args.log_config_file)
    logging.logger.info("loading %s", args.model_name)
    model = AlexNetModel(args.model_name)
    model.load()
    ModelServer().start([model])

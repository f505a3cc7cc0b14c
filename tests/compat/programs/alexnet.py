import argparse
import base64
import io
from typing import Dict

import torch
from kserve_lite.compat import Model, ModelServer, model_server
from PIL import Image
from torchvision import models, transforms


class AlexNetModel(Model):
    def __init__(self, name: str):
        super().__init__(name, return_response_headers=True)
        self.name = name
        self.load()

    def load(self):
        self.model = models.alexnet(weights=models.AlexNet_Weights.IMAGENET1K_V1)
        self.model.eval()
        self.ready = True

    async def predict(
        self,
        payload: Dict,
        headers: Dict[str, str] = None,
        response_headers: Dict[str, str] = None,
    ) -> Dict:
        # One picture a row: {"image": {"b64": "..."}}
        img_data = payload["instances"][0]["image"]["b64"]
        input_image = Image.open(io.BytesIO(base64.b64decode(img_data)))
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
        output = self.model(input_batch)
        values, top_5 = torch.topk(torch.nn.functional.softmax(output, dim=1), 5)
        response_headers.update({"my-header": "sample"})
        return {"predictions": values.tolist()}


parser = argparse.ArgumentParser(parents=[model_server.parser])
parser.add_argument("--greeting", default="", help="A flag of the program's own.")
args, _ = parser.parse_known_args()

if __name__ == "__main__":
    model = AlexNetModel(args.model_name)
    ModelServer().start([model])

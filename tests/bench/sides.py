"""The two sides, to run step by step: tinyti's training and that of diffusers' example script."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import tinyti
from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES, make_examples
from tinyti.files.pictures import read_photos
from tinyti.graphs import no_graphs
from tinyti.inversion import Inversion, invert

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = {"lr": 2e-3, "batch": 4, "steps": 3000}  # from the example's README: 5e-4, scaled by a batch of 4


class Ours:
    """tinyti's training, to run step by step."""

    def __init__(self, weights, images, device, precision, size, batch, vectors):
        self.model = tinyti.load(weights, device, DTYPES[precision])
        mean = self.model.text.table.mean(0, keepdim=True)
        concept = self.model.add_word("S*", tinyti.Concept.initial(mean, vectors))
        photos, _ = read_photos(images, size)
        examples = make_examples(self.model, "S*", photos, OBJECT_TEMPLATES)
        state = Inversion(self.model, concept)
        state.evaluations = [0.0] * 10**6  # so that no step computes an evaluation
        self.begin = lambda: invert(self.model, state, examples, 10**6, batch)
        self.steps = self.begin()

    def step(self):
        next(self.steps)

    def unrecorded(self):
        """A step without CUDA graphs, so that its operations can be counted."""
        with no_graphs():
            next(self.begin())


def load_ours(weights):
    """Our VAE, UNet and text transformer."""
    model = tinyti.load(weights)
    return model.vae, model.unet, model.text


def load_theirs(weights):
    """VAE, UNet and text transformer of diffusers and transformers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    return [kind.from_pretrained(weights, subfolder=name) for name, kind in kinds.items()]


class Theirs:
    """The training loop of diffusers' examples/textual_inversion, rewritten: the same operations in order."""

    def __init__(
        self, weights, images, device, precision, size, batch, vectors, style=False, start=None, seed=0
    ):
        from diffusers import DDPMScheduler
        from transformers import CLIPTokenizer

        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.device, self.dtype, self.size, self.batch = torch.device(device), DTYPES[precision], size, batch
        self.files = sorted(file for file in Path(images).iterdir() if file.is_file())
        self.templates = STYLE_TEMPLATES if style else OBJECT_TEMPLATES
        self.tokenizer = CLIPTokenizer.from_pretrained(weights, subfolder="tokenizer")
        self.noise = DDPMScheduler.from_pretrained(weights, subfolder="scheduler")
        self.vae, self.unet, self.text = load_theirs(weights)
        self.names = [f"<placeholder-{i}>" for i in range(vectors)]
        self.tokenizer.add_tokens(self.names)
        self.ids = self.tokenizer.convert_tokens_to_ids(self.names)
        self.text.resize_token_embeddings(self.text.config.vocab_size + vectors, mean_resizing=False)
        self.vae.requires_grad_(False).to(self.device, self.dtype)
        self.unet.requires_grad_(False).to(self.device, self.dtype)
        self.text.requires_grad_(False).to(self.device).train()  # stays in fp32
        table = self.text.get_input_embeddings().requires_grad_()
        self.table = table.weight
        start_id = self.tokenizer(start, add_special_tokens=False).input_ids[0] if start else 0
        with torch.no_grad():
            self.table[self.ids] = self.table[start_id].clone()
        self.before = self.table.detach().clone()
        self.frozen = torch.ones(len(self.table), dtype=torch.bool, device=self.device)
        self.frozen[self.ids] = False
        self.optimizer = torch.optim.AdamW(table.parameters(), RECIPE["lr"], weight_decay=1e-2)

    def example(self):
        """A sample of the batch: a picture, read, resized and perhaps mirrored, and a tokenised prompt."""
        image = Image.open(self.random.choice(self.files)).convert("RGB")
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        prompt = self.random.choice(self.templates).replace("{}", " ".join(self.names))
        options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        return pixels, self.tokenizer(prompt, **options).input_ids[0]

    def step(self):
        batch = zip(*(self.example() for _ in range(self.batch)))
        pixels, ids = (torch.stack(part).to(self.device) for part in batch)
        x_0 = self.vae.encode(pixels.to(self.dtype)).latent_dist.sample().detach()
        x_0 = x_0 * self.vae.config.scaling_factor
        eps = torch.randn_like(x_0)
        t = torch.randint(self.noise.config.num_train_timesteps, (self.batch,), device=self.device)
        x_t = self.noise.add_noise(x_0, eps, t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            context = self.text(ids)[0].to(self.dtype)
        prediction = self.unet(x_t, t, context).sample
        is_v = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(x_0, eps, t) if is_v else eps
        F.mse_loss(prediction.float(), target.float()).backward()
        self.optimizer.step()  # changes the whole vocabulary; the other rows are restored below
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.frozen] = self.before[self.frozen]

    unrecorded = step


SIDES = {"tinyti": Ours, "diffusers": Theirs}
LOADERS = {"tinyti": load_ours, "diffusers": load_theirs}

"""Train CLIP, which matches captions and pictures (2103.00020)."""

import torch
import torch.nn.functional as F

from tinyti.networks.clip import TextConfig
from tinyti.networks.vision import CLIP, CLIPConfig, Preprocessing, VisionConfig

from .measure import class_numbers
from .training import integers, to_images, train_stage

PAIRS = ("colour", "scene"), ("colour", "style"), ("scene", "style"), *[("thing", "colour")] * 3
QUIZZES = 9  # kinds of batches; the first six are the hard ones of PAIRS


def train_clip(work, array, ids, full, captions):
    """Train both towers contrastively (2103.00020, figure 3).

    Two of three batches are hard: their pictures agree in two of colour, scene and style, or in thing and
    colour; the last kind uses complete captions (`full`).  With easy batches alone the towers look at the
    backgrounds: they hardly learn the things, and no details such as the eyes of a cat.
    """
    recipe, trained = work.recipe, captions[: work.recipe.pictures]
    heads = {head for pair in PAIRS for head in pair}
    classes = {head: class_numbers(trained, head).to(work.device) for head in heads}
    ids, full = ids.to(work.device), full.to(work.device)
    torch.manual_seed(0)
    model = make_clip(recipe, int(ids.max()) + 1)
    work.load_start(model, "clip")
    # The tower is causal: tokens after the end of the longest caption cannot change the result.
    used = max(int((each == ids.max()).int().argmax(1).max()) + 1 for each in (ids, full))

    def loss_of(generator, count):
        rows = integers(recipe.pictures, count, generator)
        kind = int(integers(QUIZZES, (), generator))
        pair = PAIRS[kind] if kind < len(PAIRS) else ()
        if pair:
            agree = torch.stack([classes[head] == classes[head][rows[0]] for head in pair]).all(0)
            same = agree.nonzero()[:, 0]
            rows = same[integers(len(same), count, generator)]
        words = (full if "thing" in pair else ids)[rows, :used]
        a, b = model.encode_image(to_images(array[rows])).float(), model.encode_text(words).float()
        with torch.autocast(work.device, enabled=False):
            logits = model.logit_scale.exp().clamp(max=100) * a @ b.T
        truth = torch.arange(len(rows), device=work.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    train_stage(work, "clip", model, loss_of, recipe.clip_samples, recipe.clip_batch, lr=1e-3)
    return model.eval().requires_grad_(False)


def make_clip(recipe, vocabulary):
    """Make the untrained towers; the last id of the vocabulary is the end of a caption."""
    tower = {
        "hidden_size": recipe.clip_width,
        "intermediate_size": 4 * recipe.clip_width,
        "num_hidden_layers": recipe.clip_layers,
        "num_attention_heads": recipe.clip_width // 32,
        "hidden_act": "gelu",
    }
    text = TextConfig(vocab_size=vocabulary, eos_token_id=vocabulary - 1, **tower)
    vision = VisionConfig(image_size=recipe.size, patch_size=recipe.clip_patch, **tower)
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocessing(resize=recipe.size, crop=recipe.size, mean=half, std=half)
    return initialise(CLIP(CLIPConfig(text, vision, recipe.clip_width), preprocess))


def initialise(model):
    """Use CLIP's initial scale: small embeddings, and smaller residual branches in deeper towers."""
    for name, p in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight", "class_embedding")):
            torch.nn.init.normal_(p, std=0.02)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            layers = model.config.text_config.num_hidden_layers
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (2 * layers) ** -0.5)
    return model

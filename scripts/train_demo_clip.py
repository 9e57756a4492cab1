"""Train the CLIP of the demo's world and write it, with its model card, as a transformers folder.

    python scripts/train_demo_clip.py --out src/msae/world/clip

Needs transformers, tokenizers and Pillow; a C++ compiler makes it 1.6 times as fast (`--no-compile` without).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version

from msae.base.files import atomic_folder
from msae.world.drawing import draw
from msae.world.scenes import (
    ATTRIBUTES,
    SHAPES,
    TRAINING_SEEDS,
    UNSEEN_SEEDS,
    VOCABULARY,
    Scene,
    Value,
    attributes,
    caption,
    sample_scene,
)
from yardstick import Scores, measure

CARD = Path(__file__).with_name("demo_clip_card.md")
PIXELS = 64
MAX_TOKENS = 48
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BEGIN, END)  # <eos> is 3: transformers has a legacy rule for 2
TOKENIZER_SETTINGS: dict[str, Any] = {
    "pad_token": PAD,
    "unk_token": UNKNOWN,
    "bos_token": BEGIN,
    "eos_token": END,
    "model_max_length": MAX_TOKENS,
    "model_input_names": ["input_ids", "attention_mask"],
}
PROCESSOR_SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": PIXELS},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": PIXELS, "width": PIXELS},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TUNING_SEED = 20_000_000  # unseen too; watched while training, so that the card's scenes decide nothing


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        n_steps: Updates.
        n_scenes: Scenes rendered for it, in equal parts for each entry of `kinds`.
        kinds: What is fixed in the scenes.
        head_weight: Weight of telling the shape by a linear head on the vision tower, later thrown away.
        word_weight: Weight of the losses on the words of every attribute.
        caption_weight: Weight of the two losses on captions.
    """

    n_steps: int
    n_scenes: int
    kinds: tuple[dict[str, Value], ...]
    head_weight: float
    word_weight: float
    caption_weight: float


EASY: dict[str, Value] = {"count": 1, "texture": "plain", "hat": False, "shadow": False, "frame": False}


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained weights.

    Shape is the one attribute that a small vision transformer is slow to find. Contrasted with texts it
    stays at chance beside the other losses, and for the first 300 steps even alone. A linear head on plain
    objects that are not small finds it in half of that; from then on the texts learn it as they learn the
    rest.
    """

    easy: Stage = Stage(350, 16_000, ({**EASY, "size": "medium"}, {**EASY, "size": "large"}), 1.0, 0.0, 0.0)
    lone: Stage = Stage(500, 24_000, ({"count": 1},), 0.5, 0.5, 0.5)
    whole: Stage = Stage(2_300, 80_000, ({},), 0.0, 0.5, 1.0)
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    max_shift: int = 3
    seed: int = 0
    width: int = 128
    heads: int = 2
    vision_layers: int = 4
    text_layers: int = 2

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The parts of the training in their order."""
        return (self.easy, self.lone, self.whole)

    @property
    def n_steps(self) -> int:
        """Updates in all."""
        return sum(stage.n_steps for stage in self.stages)


class Pool(NamedTuple):
    """Rendered scenes: `pixels` is (n, 64, 64, 3) uint8; row i shows `scenes[i]`."""

    pixels: Tensor
    scenes: list[Scene]


class Batch(NamedTuple):
    """What one step sees. `*_group` numbers the scenes so that equal numbers are told alike."""

    pixels: Tensor
    full: list[str]
    full_group: Tensor
    turned: list[str]
    part: list[str]
    part_group: Tensor
    words: list[str]
    labels: dict[str, Tensor]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the demo's language."""
    from tokenizers import Tokenizer as WordTokenizer
    from tokenizers import models, normalizers, pre_tokenizers, processors

    texts = [caption(sample_scene(seed), wording=seed) for seed in range(20_000)]
    texts += [caption(sample_scene(seed), naming=[], wording=seed) for seed in range(1_000)]
    texts += [phrase for words in VOCABULARY.values() for ways in words.values() for phrase in ways]
    split = pre_tokenizers.Whitespace()
    found = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    numbers = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *found))}
    words = WordTokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = split
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(token, numbers[token]) for token in (BEGIN, END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **TOKENIZER_SETTINGS)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP of the size in the recipe."""
    shared = {
        "hidden_size": recipe.width,
        "intermediate_size": 2 * recipe.width,
        "num_attention_heads": recipe.heads,
        "projection_dim": 128,
    }
    text = {
        **shared,
        "num_hidden_layers": recipe.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**shared, "num_hidden_layers": recipe.vision_layers, "image_size": PIXELS, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    # The fused attention's backward pass takes half of the whole step on a CPU; the plain one a tenth.
    return CLIPModel._from_config(config, attn_implementation="eager")


def render_pool(stage: Stage, first_seed: int, n_workers: int) -> Pool:
    """The scenes of a stage, rendered in worker processes."""
    share = stage.n_scenes // len(stage.kinds)
    scenes = [
        sample_scene(first_seed + number * share + k, **fixed)
        for number, fixed in enumerate(stage.kinds)
        for k in range(share)
    ]
    assert scenes[-1].seed in TRAINING_SEEDS
    chunks = [scenes[start : start + 1_000] for start in range(0, len(scenes), 1_000)]
    with ProcessPoolExecutor(n_workers) as workers:
        pixels = np.concatenate(list(workers.map(_render_chunk, chunks)))
    return Pool(torch.from_numpy(pixels), scenes)


def _render_chunk(scenes: list[Scene]) -> np.ndarray[Any, Any]:
    from PIL import Image

    pictures = (draw(scene) for scene in scenes)
    small = (picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC) for picture in pictures)
    return np.stack([np.asarray(picture) for picture in small])


def batches(pool: Pool, recipe: Recipe, n_steps: int, draws: random.Random) -> Iterator[Batch]:
    """Batches of a pool, every scene once before any comes again."""
    order: list[int] = []
    for _ in range(n_steps):
        if len(order) < recipe.batch_size:
            order = draws.sample(range(len(pool.scenes)), len(pool.scenes))
        yield _make_batch(pool, [order.pop() for _ in range(recipe.batch_size)], recipe, draws)


def _make_batch(pool: Pool, rows: list[int], recipe: Recipe, draws: random.Random) -> Batch:
    scenes = [pool.scenes[row] for row in rows]
    naming = draws.sample(list(ATTRIBUTES), draws.randint(1, 4))
    truths = [attributes(scene) for scene in scenes]
    labels = {
        name: torch.tensor([values.index(truth[name]) if truth[name] is not None else -1 for truth in truths])
        for name, values in ATTRIBUTES.items()
    }
    words = [draws.choice(VOCABULARY[name][value]) for name, values in ATTRIBUTES.items() for value in values]
    turned = [replace(scene, objects=scene.objects[::-1]) for scene in scenes if scene.relation]
    return Batch(
        pixels=_shifted(pool.pixels[rows], recipe.max_shift, draws),
        full=[caption(scene, wording=draws.getrandbits(24)) for scene in scenes],
        full_group=_groups([caption(scene) for scene in scenes]),
        turned=[caption(scene, wording=draws.getrandbits(24)) for scene in turned],
        part=[caption(scene, naming=naming, wording=draws.getrandbits(24)) for scene in scenes],
        part_group=_groups([caption(scene, naming=naming) for scene in scenes]),
        words=words,
        labels=labels,
    )


def _groups(keys: Sequence[str]) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _shifted(pixels: Tensor, most: int, draws: random.Random) -> Tensor:
    """The pictures moved by up to `most` pixels, all alike, the border repeated; float, -1 to 1."""
    floats = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    wide = functional.pad(floats, (most,) * 4, mode="replicate")
    x, y = draws.randint(0, 2 * most), draws.randint(0, 2 * most)
    return wide[:, :, y : y + PIXELS, x : x + PIXELS].contiguous()


class Trainer:
    """The model with what it takes to compute the loss of a batch."""

    def __init__(self, recipe: Recipe, *, compiled: bool) -> None:
        self.recipe = recipe
        self.tokenizer = build_tokenizer()
        self.model = build_model(recipe, self.tokenizer)
        self.shape_head = nn.Linear(recipe.width, len(SHAPES))
        self.see = torch.compile(self.model.vision_model) if compiled else self.model.vision_model

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit rows, one per text; a text that comes twice is computed once."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer(list(numbers), padding=True, return_tensors="pt")
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        rows = functional.normalize(self.model.text_projection(pooled).float(), dim=-1)
        return rows[torch.tensor([numbers[text] for text in texts])]

    def loss(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        """The losses of a batch by what they are on, each with its weight in the stage."""
        pooled = self.see(pixel_values=batch.pixels).pooler_output
        losses = {}
        if stage.head_weight:
            shapes = self.shape_head(pooled).float()
            losses["head"] = stage.head_weight * cross_entropy(shapes, batch.labels["shape"])
        rows = functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)
        images = self.model.logit_scale.exp() * rows
        if stage.word_weight:
            sizes = [len(values) for values in ATTRIBUTES.values()]
            words = (images @ self.embed_texts(batch.words).T).split(sizes, dim=1)
            for (name, labels), logits in zip(batch.labels.items(), words, strict=True):
                losses[name] = stage.word_weight * cross_entropy(logits, labels)
        if stage.caption_weight:
            full = images @ self.embed_texts([*batch.full, *batch.turned]).T
            part = images @ self.embed_texts(batch.part).T
            losses["full"] = stage.caption_weight * contrast(full, batch.full_group)
            losses["part"] = stage.caption_weight * contrast(part, batch.part_group)
        return losses


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows whose label is not -1; zero where there is none."""
    total = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(1)


def contrast(similar: Tensor, group: Tensor) -> Tensor:
    """Symmetric contrastive loss in which every picture and text of one group belong together.

    `similar` is (pictures, texts); texts beyond the number of pictures belong to none of them.
    """
    together = (group[:, None] == group[None, :]).float()
    target = together / together.sum(dim=1, keepdim=True)
    to_text = similar.log_softmax(dim=1)[:, : len(group)]
    to_image = similar[:, : len(group)].log_softmax(dim=0)
    return -((target * to_text).sum(1).mean() + (target.T * to_image).sum(0).mean()) / 2


def train(trainer: Trainer, watch: Callable[[], None], *, n_workers: int, watch_every: int) -> None:
    """Train the model in place, stage after stage under one schedule of the learning rate."""
    recipe, model = trainer.recipe, trainer.model
    optimizers = _optimizers(trainer)
    draws = random.Random(recipe.seed)
    step, first_seed, started = 0, TRAINING_SEEDS.start, time.monotonic()
    for stage in recipe.stages:
        pool = render_pool(stage, first_seed, n_workers)
        first_seed += stage.n_scenes
        print(f"rendered {stage.n_scenes} scenes after {time.monotonic() - started:.0f} s", flush=True)
        for stage_step, batch in enumerate(batches(pool, recipe, stage.n_steps, draws)):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate * _rate(step, stage_step, recipe)
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                losses = trainer.loss(batch, stage)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            step += 1
            if step % 50 == 0:
                shown = " ".join(f"{name} {loss.item():.2f}" for name, loss in losses.items())
                print(f"{step} {time.monotonic() - started:.0f}s {shown}", flush=True)
            if step % watch_every == 0:
                watch()


def _optimizers(trainer: Trainer) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the towers, AdamW for all other weights."""
    recipe = trainer.recipe
    towers = [trainer.model.vision_model.encoder, trainer.model.text_model.encoder]
    inside = [weight for tower in towers for weight in tower.parameters() if weight.ndim == 2]
    rest = [*trainer.model.parameters(), *trainer.shape_head.parameters()]
    rest = [weight for weight in rest if not any(weight is other for other in inside)]
    groups = [
        {"params": [weight for weight in rest if weight.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in rest if weight.ndim < 2], "weight_decay": 0.0},
    ]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return (
        torch.optim.Muon(inside, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True),
    )


def _rate(step: int, stage_step: int, recipe: Recipe) -> float:
    """Share of the learning rate: a cosine to zero over all steps, with a linear rise into every stage."""
    rise = min(1.0, (stage_step + 1) / recipe.warmup_steps)
    return rise * 0.5 * (1 + math.cos(math.pi * step / recipe.n_steps))


def save(trainer: Trainer, folder: Path) -> None:
    """Write the model as a transformers folder with half-precision weights; an older folder is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    with atomic_folder(folder) as fresh:
        state = {name: weight.half().contiguous() for name, weight in trainer.model.state_dict().items()}
        save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
        config = {**trainer.model.config.to_dict(), "architectures": ["CLIPModel"], "dtype": "float32"}
        build_tokenizer().backend_tokenizer.save(str(fresh / "tokenizer.json"))
        # The class of transformers 4; 5 knows it too, while 4 does not know the name that 5 would write.
        words = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENIZER_SETTINGS}
        files = {"config": config, "tokenizer_config": words, "preprocessor_config": PROCESSOR_SETTINGS}
        (fresh / "model.safetensors").chmod(0o644)  # safetensors makes it private
        for name, content in files.items():
            (fresh / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def score(folder: Path, *, n_scenes: int, first_seed: int) -> Scores:
    """The yardstick on a saved folder, read the way any user reads it."""
    from PIL import Image

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)

    def embed_images(pictures: Sequence[Image.Image]) -> np.ndarray[Any, Any]:
        pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
        rows = [model.vision_model(pixel_values=part).pooler_output for part in pixels.split(256)]
        return model.visual_projection(torch.cat(rows)).numpy()

    def embed_texts(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        pooled = model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return model.text_projection(pooled).numpy()

    with torch.inference_mode():
        return measure(embed_images, embed_texts, n_scenes=n_scenes, first_seed=first_seed)


def print_scores(scores: Scores) -> None:
    """One line of scores."""
    recalls = f"R@1 {scores.recall_at_1:.3f} R@5 {scores.recall_at_5:.3f} order {scores.order:.3f}"
    zero_shot = "".join(f" {name} {share:.3f}" for name, share in scores.zero_shot.items())
    print(f"  {recalls}{zero_shot}", flush=True)


def write_card(folder: Path, recipe: Recipe, scores: Scores, *, minutes: float, threads: int) -> None:
    """Write the model card beside the weights; its numbers come from `scores` and the files."""
    weights = load_file(folder / "model.safetensors")
    parts = [("easy", recipe.easy), ("lone objects", recipe.lone), ("all scenes", recipe.whole)]
    stages = [
        f"| {name} | {part.n_steps:,} | {part.n_scenes:,} | {part.head_weight} | {part.word_weight} "
        f"| {part.caption_weight} |"
        for name, part in parts
    ]
    zero_shot = [
        f"| zero-shot {name} | {share:.3f} | {1 / len(ATTRIBUTES[name]):.3f} |"
        for name, share in scores.zero_shot.items()
    ]
    text = CARD.read_text().format(
        **{**asdict(recipe), **asdict(scores), "zero_shot": "\n".join(zero_shot)},
        n_steps=recipe.n_steps,
        n_parameters=sum(weight.numel() for weight in weights.values()),
        size_mb=sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
        n_words=len(build_tokenizer()) - len(SPECIAL_TOKENS),
        threads=threads,
        minutes=minutes,
        torch=torch.__version__,
        transformers=transformers_version,
        unseen_from=UNSEEN_SEEDS.start,
        stages="\n".join(stages),
        pixels=PIXELS,
        chance_1=1 / scores.n_scenes,
        chance_5=5 / scores.n_scenes,
    )
    (folder / "README.md").write_text(text)


def main() -> None:
    """Train, save, measure what was saved, and write its card."""
    parser = argparse.ArgumentParser(description="Train the CLIP of the demo's world.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--preview", type=Path, help="folder of the unfinished model, for the impatient")
    parser.add_argument("--watch-every", type=int, default=500, help="steps between two looks at the scores")
    parser.add_argument("--threads", type=int, default=1, help="one waits least on a busy machine")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    options = parser.parse_args()
    recipe = Recipe(seed=options.seed)
    torch.set_num_threads(options.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    trainer = Trainer(recipe, compiled=not options.no_compile)

    def watch() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.preview or Path(scratch) / "clip"
            save(trainer, folder)
            print_scores(score(folder, n_scenes=500, first_seed=TUNING_SEED))

    train(trainer, watch, n_workers=options.workers, watch_every=options.watch_every)
    save(trainer, options.out)
    scores = score(options.out, n_scenes=1000, first_seed=UNSEEN_SEEDS.start)
    minutes = (time.monotonic() - started) / 60
    write_card(options.out, recipe, scores, minutes=minutes, threads=options.threads)
    print_scores(scores)


if __name__ == "__main__":
    main()
